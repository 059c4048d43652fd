"""Numerics of the methods: tensors in, tensors out; no files, no printing."""
