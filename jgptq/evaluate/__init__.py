"""Evaluation of a decoder: perplexity."""
