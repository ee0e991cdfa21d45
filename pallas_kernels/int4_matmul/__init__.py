"""Products with packed group-wise codes."""
