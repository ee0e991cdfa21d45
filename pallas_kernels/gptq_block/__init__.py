"""The inner loop of the solver: a block of rows quantized in sequence."""
