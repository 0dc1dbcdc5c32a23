"""Quantizers and the op that multiplies quantised operands; knows nothing of Flax."""
