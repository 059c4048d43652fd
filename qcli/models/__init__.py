"""Where models live and how they run: families as data, weights from disk, one block at a time."""
