"""The methods, one file each. Nothing here imports anything of ours but `grid`, and torch."""
