"""The Flax (NNX) decoder as blocks of stages."""

from jgptq.models.block import Block, Carry, Head, Stage, Unit
from jgptq.models.config import FAMILIES, ModelConfig, config_from_hf, config_to_hf
from jgptq.models.decoder import Decoder, Origin
from jgptq.models.layers import Embedding, Linear, RMSNorm

__all__ = [
    "FAMILIES",
    "Block",
    "Carry",
    "Decoder",
    "Embedding",
    "Head",
    "Linear",
    "ModelConfig",
    "Origin",
    "RMSNorm",
    "Stage",
    "Unit",
    "config_from_hf",
    "config_to_hf",
]
