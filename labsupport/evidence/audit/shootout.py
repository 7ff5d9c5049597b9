"""Claims that are settled from the rows of `labs sweep shootout`: every method on one axis of stored bytes."""
