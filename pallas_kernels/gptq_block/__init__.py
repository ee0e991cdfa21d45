"""The solver's inner loop: a block of rows quantized in sequence."""
