"""The methods: one file each, and this table."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from jgptq.settings import solver as settings
from jgptq.solver.methods.base import Method, Statistics
from jgptq.solver.methods.gptaq import GPTAQ
from jgptq.solver.methods.gptq import GPTQ
from jgptq.solver.methods.qronos import Qronos
from jgptq.solver.methods.rtn import RTN

METHODS: Mapping[settings.Method, Callable[[settings.SolverConfig], Method]] = MappingProxyType(
    {"gptq": GPTQ.of, "gptaq": GPTAQ.of, "qronos": Qronos.of, "rtn": RTN.of}
)


def method_of(config: settings.SolverConfig) -> Method:
    """The method that a config names, with its settings resolved."""
    return METHODS[config.method](config)


__all__ = ["METHODS", "Method", "Statistics", "method_of"]
