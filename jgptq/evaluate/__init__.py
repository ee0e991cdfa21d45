"""What a decoder is worth: perplexity."""
