"""The exceptions that jgptq raises.

A message names the file or tensor, what was expected, what was found, and the next thing to try.
"""


class JgptqError(Exception):
    """Base class of all errors that jgptq raises on purpose; any other exception is a defect."""


class ConfigError(JgptqError, ValueError):
    """A setting, or a combination of settings, that cannot be used."""


class ArchitectureError(JgptqError, ValueError):
    """A model whose architecture, or a switch of it, is not implemented."""


class CheckpointError(JgptqError):
    """A checkpoint folder that is missing, truncated, corrupt or does not match its own config."""


class CalibrationError(JgptqError, ValueError):
    """Calibration or evaluation tokens that cannot be used."""


class NumericalError(JgptqError, ArithmeticError):
    """NaN, infinity, or a Hessian that no damping can factor; names the layer."""


class OutputError(JgptqError, OSError):
    """An output folder that exists, or a disk that cannot hold the result."""


class RuleWarning(UserWarning):
    """A rule that has no effect on the model, most likely because its pattern is wrong."""
