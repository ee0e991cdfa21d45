"""Settings of a run, rules for single linears, and presets."""
