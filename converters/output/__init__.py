"""Folders that are written whole or not at all: their shards, what describes them, and how leaves become tensors."""
