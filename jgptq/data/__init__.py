"""Text and tokens to calibrate on and to measure with."""
