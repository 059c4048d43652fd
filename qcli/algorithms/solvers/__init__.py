"""Numerics that methods share: tensors in, tensors out; no files, no options, no printing."""
