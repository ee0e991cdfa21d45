"""Files of a checkpoint folder -> where each tensor lies. Every byte is taken for hostile until it is checked."""
