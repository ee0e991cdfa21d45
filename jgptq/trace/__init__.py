"""Models that are not ours: their linears, read from the traced computation, and the steps in which these are quantized."""
