"""Parts of config.json files of tiny models, in the keys that most families share."""

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
BASE = {**SIZES, **HEADS, "max_position_embeddings": 64, "rms_norm_eps": 0.01, "rope_theta": 500.0, "pad_token_id": None}


def hf_dict(model_type: str, **changes) -> dict:
    """A config.json written by hand in the old style: `rope_scaling`, and `rope_theta` as a key of its own."""
    return {"model_type": model_type, **BASE, **changes}


SLIDING = {"use_sliding_window": True, "sliding_window": 5}
SLIDES = ["sliding_attention", "sliding_attention"]
