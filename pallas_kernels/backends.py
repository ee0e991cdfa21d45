"""Which backend runs a kernel: decided here and nowhere else."""

from typing import Literal

import jax

Backend = Literal["auto", "triton", "mosaic", "jax", "interpret"]
BACKENDS = ("auto", "triton", "mosaic", "jax", "interpret")
LEAST_CAPABILITY = {"triton": 8.0, "mosaic": 9.0}
"""Least compute capability: bfloat16 tensor cores and asynchronous copies for Triton; wgmma and bulk copies for Mosaic GPU."""


def resolve(backend: Backend, unfit: str | None = None) -> Backend:
    """The backend to run: "auto" is Triton on a new enough NVIDIA GPU, for operands that the kernel takes; else plain JAX.

    Mosaic GPU is chosen by name alone, for it has not been measured.

    Args:
      backend: the caller's choice.
      unfit: why a kernel cannot take these operands, as a phrase; None where it can.

    Raises:
      ValueError: an unknown backend, or one chosen by name that cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, found {backend!r}")
    if backend == "auto":
        return "triton" if unfit is None and unsupported(jax.devices()[0], "triton") is None else "jax"
    if backend != "jax" and unfit is not None:
        raise ValueError(f"backend {backend!r} {unfit}; backend='jax' takes them")
    if backend in LEAST_CAPABILITY and (reason := unsupported(jax.devices()[0], backend)) is not None:
        raise ValueError(f"backend {backend!r} {reason}; backend='jax' runs everywhere")
    return backend


def unsupported(device: jax.Device, backend: str) -> str | None:
    """Why a device cannot run a backend's kernels, as a phrase, or None."""
    if device.platform not in ("gpu", "cuda"):
        return f"needs an NVIDIA GPU, found {device.platform}"
    capability = str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "", 1).isdigit():
        return f"needs an NVIDIA GPU, found {device.device_kind}"
    if backend == "mosaic" and float(capability) >= 10.0:
        return f"needs a Hopper GPU, whose wgmma later ones have not; {device.device_kind} has compute capability {capability}"
    if float(capability) < LEAST_CAPABILITY[backend]:
        return f"needs compute capability {LEAST_CAPABILITY[backend]}, {device.device_kind} has {capability}"
    return None
