"""Which backend runs a kernel: decided here and nowhere else."""

from typing import Literal

import jax

Backend = Literal["auto", "triton", "mosaic", "jax", "interpret"]
BACKENDS = ("auto", "triton", "mosaic", "jax", "interpret")
OLDEST = {"triton": 8.0, "mosaic": 9.0}
"""Compute capability that kernels need: bfloat16 in tensor cores and asynchronous copies; wgmma and bulk copies."""


def resolve(backend: Backend, unfit: str | None = None) -> Backend:
    """What "auto" stands for: Triton on an NVIDIA GPU that is new enough, for operands that the kernel takes; else plain JAX.

    Mosaic GPU has to be asked for by name, until a measurement says where it is faster.

    Args:
      backend: as the caller asked for it.
      unfit: why a kernel cannot take these operands, as a phrase; None where it can.

    Raises:
      ValueError: a backend that is unknown, or that was asked for by name and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, found {backend!r}")
    if backend == "auto":
        return "triton" if unfit is None and missing(jax.devices()[0], "triton") is None else "jax"
    if backend != "jax" and unfit is not None:
        raise ValueError(f"backend {backend!r} {unfit}; backend='jax' takes them")
    if backend in OLDEST and (reason := missing(jax.devices()[0], backend)) is not None:
        raise ValueError(f"backend {backend!r} {reason}; backend='jax' runs everywhere")
    return backend


def missing(device: jax.Device, backend: str) -> str | None:
    """Why a device cannot run a backend's kernels, as a phrase, or None."""
    if device.platform not in ("gpu", "cuda"):
        return f"needs an NVIDIA GPU, found {device.platform}"
    found = str(getattr(device, "compute_capability", ""))
    if not found.replace(".", "", 1).isdigit():
        return f"needs an NVIDIA GPU, found {device.device_kind}"
    if backend == "mosaic" and float(found) >= 10.0:
        return f"needs a Hopper GPU, whose wgmma later ones have not; {device.device_kind} has compute capability {found}"
    if float(found) < OLDEST[backend]:
        return f"needs compute capability {OLDEST[backend]}, {device.device_kind} has {found}"
    return None
