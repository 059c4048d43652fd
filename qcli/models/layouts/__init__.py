"""How other engines store the same quantized weights: names, order of bits, and what their config says of a layer."""
