"""GPTQ quantization of large language models in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jgptq.data.tokens import calibration_tokens, evaluation_tokens
    from jgptq.errors import JgptqError
    from jgptq.evaluate.perplexity import perplexity
    from jgptq.models.serving import for_serving
    from jgptq.run.entry import quantize
    from jgptq.run.report import Report
    from jgptq.settings.rule import Rule
    from jgptq.settings.run import QuantizeConfig
    from jgptq.trace.packed_array import dequantized

__all__ = [
    "JgptqError",
    "QuantizeConfig",
    "Report",
    "Rule",
    "calibration_tokens",
    "dequantized",
    "evaluation_tokens",
    "for_serving",
    "perplexity",
    "quantize",
]

_MODULES = {
    "JgptqError": "jgptq.errors",
    "QuantizeConfig": "jgptq.settings.run",
    "Report": "jgptq.run.report",
    "Rule": "jgptq.settings.rule",
    "calibration_tokens": "jgptq.data.tokens",
    "dequantized": "jgptq.trace.packed_array",
    "evaluation_tokens": "jgptq.data.tokens",
    "for_serving": "jgptq.models.serving",
    "perplexity": "jgptq.evaluate.perplexity",
    "quantize": "jgptq.run.entry",
}
"""Where each public name is defined. A module is imported when a name of it is first used (PEP 562), so that the command line
answers `--help` without importing jax."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
