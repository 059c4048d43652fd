"""Models: families as data, weights read from disk, one block in memory at a time."""
