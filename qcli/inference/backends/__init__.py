"""Ways to compute a quantized layer from its packed tensors, one file each, registered under the file's name."""
