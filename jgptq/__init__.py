"""GPTQ quantization of large language models in JAX."""

from jgptq.data.tokens import calibration_tokens, evaluation_tokens
from jgptq.errors import JgptqError
from jgptq.evaluate.perplexity import perplexity
from jgptq.models.serving import for_serving
from jgptq.run.driver import quantize
from jgptq.run.report import Report
from jgptq.settings.rule import Rule
from jgptq.settings.run import QuantizeConfig

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
