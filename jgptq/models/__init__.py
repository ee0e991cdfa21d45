"""The Flax (NNX) decoder as blocks of stages, and the table of architectures."""

from jgptq.models.architecture.config import AlibiPositions, LayerConfig, LearnedPositions, ModelConfig
from jgptq.models.architecture.experts import ExpertsConfig
from jgptq.models.architecture.families import FAMILIES, checkpoint_name, file_type
from jgptq.models.architecture.hf_config import config_from_hf, config_to_hf
from jgptq.models.architecture.latent import LatentConfig
from jgptq.models.block import Block, Carry, Head, Unit
from jgptq.models.decoder import Decoder, Origin
from jgptq.models.layers import Embedding, LayerNorm, Linear, Norm, RMSNorm
from jgptq.models.mixture.linears import Expert, ExpertLinear, single_linears
from jgptq.models.rotary import RopeConfig
from jgptq.models.stages import RESIDUAL, Fusion, Stage, Step

__all__ = [
    "FAMILIES",
    "RESIDUAL",
    "AlibiPositions",
    "Block",
    "Carry",
    "Decoder",
    "Embedding",
    "Expert",
    "ExpertLinear",
    "ExpertsConfig",
    "Fusion",
    "Head",
    "LatentConfig",
    "LayerConfig",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "ModelConfig",
    "Norm",
    "Origin",
    "RMSNorm",
    "RopeConfig",
    "Stage",
    "Step",
    "Unit",
    "checkpoint_name",
    "config_from_hf",
    "config_to_hf",
    "file_type",
    "single_linears",
]
