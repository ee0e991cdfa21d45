"""Text and tokens for calibration and evaluation."""
