"""The compiled kernels of the `cpu` backend."""
