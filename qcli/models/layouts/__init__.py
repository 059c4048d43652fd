"""How other engines store quantized weights: tensor names, bit order, and their `quantization_config`.

One file a layout, registered under its `quant_method` in `config.json`; what it exports is the source that reads it.
"""
