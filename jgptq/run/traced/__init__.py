"""The quantization of models that are not ours, on their traced computation."""
