"""GPTQ quantization of large language models in JAX."""

from jgptq.calibration import calibration_tokens, evaluation_tokens
from jgptq.config import QuantizeConfig, Rule
from jgptq.errors import JgptqError
from jgptq.perplexity import perplexity
from jgptq.quantize import quantize
from jgptq.serving import for_serving
from jgptq.summary import Report

__all__ = [
    "JgptqError",
    "QuantizeConfig",
    "Report",
    "Rule",
    "calibration_tokens",
    "evaluation_tokens",
    "for_serving",
    "perplexity",
    "quantize",
]
