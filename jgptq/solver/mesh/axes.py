"""The mesh and its named axes: what lies where when a quantization runs on several devices.

`data` divides calibration batches: sums over tokens are reduced over it. `model` divides features of activations, and what needs
no communication, such as the output columns of a solve. A matrix that belongs to neither alone is cut by columns over both
together.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jgptq.errors import ConfigError

DATA, MODEL = "data", "model"
ALL = (MODEL, DATA)
"""Both axes as one. Devices of equal `model` come after each other, so that a reduce-scatter over `data` ends in place."""

COLUMNS = PartitionSpec(None, ALL)
ACTIVATIONS = PartitionSpec(DATA, MODEL)
VECTOR = PartitionSpec(ALL)
WHOLE = PartitionSpec()


def make_mesh(*, data: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices out as a `data` x `model` mesh.

    Args:
      data: how many ways batches are divided.
      model: how many ways output columns are divided.
      devices: those to use, the first `data * model` of them; None means `jax.devices()`.

    Returns:
      The mesh, with axes named "data" and "model".

    Raises:
      ConfigError: an axis is empty, or there are too few devices.
    """
    if data < 1 or model < 1:
        raise ConfigError(f"both axes of a mesh must be at least 1, found data={data}, model={model}")
    available = list(jax.devices() if devices is None else devices)
    if len(available) < data * model:
        kind = available[0].device_kind if available else "no"
        raise ConfigError(
            f"a mesh of data={data} x model={model} needs {data * model} devices, found {len(available)} ({kind}); make an axis "
            "smaller, or force devices on a CPU with XLA_FLAGS=--xla_force_host_platform_device_count=N"
        )
    grid = np.asarray(available[: data * model], dtype=object).reshape(data, model)
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def check_axes(mesh: Mesh) -> None:
    """Refuses a mesh whose axes are not the named ones.

    Raises:
      ConfigError: an axis is missing, or there is another.
    """
    if set(mesh.axis_names) != {DATA, MODEL}:
        raise ConfigError(f"a mesh must have the axes {DATA!r} and {MODEL!r}, found {mesh.axis_names}; use make_mesh")


def by_columns(mesh: Mesh) -> NamedSharding:
    """Of a matrix whose last axis is divided over all devices: kernels `[K, N]`, slabs of a Hessian `[K, K]`."""
    return NamedSharding(mesh, COLUMNS)


def by_tokens(mesh: Mesh) -> NamedSharding:
    """Of activations `[T, K]`: tokens over `data`, features over `model`, as tensor parallelism leaves them."""
    return NamedSharding(mesh, ACTIVATIONS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device holds."""
    return NamedSharding(mesh, WHOLE)
