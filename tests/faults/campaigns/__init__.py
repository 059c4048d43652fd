"""One file per campaign; see `tests.faults.registry`."""
