"""Which backend runs a kernel: decided here and nowhere else."""

from typing import Literal

import jax

Backend = Literal["auto", "triton", "jax", "interpret"]
BACKENDS = ("auto", "triton", "jax", "interpret")
OLDEST = 8.0
"""Compute capability that the kernels need: bfloat16 in tensor cores and asynchronous copies."""


def resolve(backend: Backend, unfit: str | None = None) -> Backend:
    """What "auto" stands for: Triton on an NVIDIA GPU that is new enough, for operands that the kernel takes; else plain JAX.

    Args:
      backend: as the caller asked for it.
      unfit: why a kernel cannot take these operands, as a phrase; None where it can.

    Raises:
      ValueError: a backend that is unknown, or that was asked for by name and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, found {backend!r}")
    if backend == "auto":
        return "triton" if unfit is None and missing(jax.devices()[0]) is None else "jax"
    if backend in ("triton", "interpret") and unfit is not None:
        raise ValueError(f"backend {backend!r} {unfit}; backend='jax' takes them")
    if backend == "triton" and (reason := missing(jax.devices()[0])) is not None:
        raise ValueError(f"backend 'triton' {reason}; backend='jax' runs everywhere")
    return backend


def missing(device: jax.Device) -> str | None:
    """Why a device cannot run the kernels, as a phrase, or None."""
    if device.platform not in ("gpu", "cuda"):
        return f"needs an NVIDIA GPU, found {device.platform}"
    found = str(getattr(device, "compute_capability", ""))
    if not found.replace(".", "", 1).isdigit():
        return f"needs an NVIDIA GPU, found {device.device_kind}"
    if float(found) < OLDEST:
        return f"needs compute capability {OLDEST}, {device.device_kind} has {found}"
    return None
