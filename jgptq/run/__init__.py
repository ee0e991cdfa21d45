"""The main job: a decoder quantized block by block."""
