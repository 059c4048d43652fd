"""Triton kernels of the packed formats; importing the package imports no Triton."""
