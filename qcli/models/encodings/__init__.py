"""Encodings of other software that models can be read from, one file for each `quant_method` of `config.json`."""
