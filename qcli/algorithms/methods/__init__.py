"""Quantization methods: how codes and tables are chosen. One file per method, registered under the file's name."""
