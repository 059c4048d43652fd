"""Gradient training of quantized weights and transforms: the loop, its batches and losses, and the parameters."""
