"""A whole model through a method: calibration, folding, the driver of blocks, the quantized cache, budgets."""
