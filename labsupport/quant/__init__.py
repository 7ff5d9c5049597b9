"""The methods, one file each. Nothing here imports anything of ours but `grid`, `checks` and each other, and torch."""
