"""The calibration batches on their way through the decoder, and the Hessians of what its stages read."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.calibration import check_tokens
from jgptq.config import QuantizeConfig
from jgptq.errors import CalibrationError, ConfigError
from jgptq.hostmem import to_device
from jgptq.models import Carry, Decoder, Unit
from jgptq.notation import Array
from jgptq.solver.hessian import HessianSum, accumulate, empty

CPU_BATCH_TOKENS = 1024
BATCH_TOKENS = 4096
"""Tokens in one calibration batch, unless a single sample is longer. What a batch makes on its way through a stage should fit a
CPU's cache, and fill a GPU."""


def cut_batches(params: Decoder, calib: Array | None, batch_size: int | None, config: QuantizeConfig) -> list[np.ndarray]:
    """The calibration tokens, checked and cut into batches of one shape, so that every program is compiled once.

    Args:
      params: the decoder.
      calib: int32 token ids `[samples, seq_len]`; None for a method that needs none.
      batch_size: samples in a batch, or None for the default; made smaller until it divides the samples.
      config: the run's settings.

    Returns:
      Batches `[b, seq_len]`.

    Raises:
      ConfigError: batch_size is less than one.
      CalibrationError: tokens that are missing, empty, or outside the vocabulary.
    """
    if calib is None:
        if config.method != "rtn":
            raise CalibrationError(f"method {config.method!r} needs calibration tokens; see jgptq.calibration_tokens")
        return []
    tokens = np.asarray(calib)
    if tokens.ndim != 2:
        raise CalibrationError(f"calibration tokens must be [samples, seq_len], found shape {list(tokens.shape)}")
    check_tokens(tokens, params.config.vocab_size, "calibration tokens")
    samples, length = tokens.shape
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
    at_once = CPU_BATCH_TOKENS if jax.default_backend() == "cpu" else BATCH_TOKENS
    limit = max(1, at_once // length) if batch_size is None else batch_size
    rows = max(size for size in range(1, min(limit, samples) + 1) if samples % size == 0)
    return [tokens[start : start + rows].astype(np.int32) for start in range(0, samples, rows)]


def embed(params: Decoder, batches: Sequence[np.ndarray]) -> list[Carry]:
    """The residual stream of every batch before the first block."""
    if not batches:
        return []
    table = to_device(params.embed_tokens)
    return [Carry(_embed(table, jnp.asarray(tokens), params.config.compute_dtype)) for tokens in batches]


_embed = jax.jit(lambda module, tokens, dtype: module(tokens, dtype), static_argnums=2)


def observe(work: Unit, carries: Sequence[Carry], stage: int) -> HessianSum:
    """Sums the Hessian of what a stage's linears read, over all batches.

    Args:
      work: the block, on the device.
      carries: the batches as they enter the stage.
      stage: which of the block's stages.
    """
    total = _empty(work, stage)
    for carry in carries:
        total = _observe(work, carry, total, stage=stage)
    return total


def advance(work: Unit, carries: list[Carry], stage: int, *, observe_next: bool) -> HessianSum | None:
    """Moves every batch through a stage, in place, so that only one batch exists twice at a time.

    Args:
      work: the block, on the device, with the kernels that the stage goes on with.
      carries: the batches as they enter the stage; as they leave it, afterwards.
      stage: which of the block's stages.
      observe_next: whether to sum the Hessian of what the next stage reads, as `observe` would, on the way.

    Returns:
      That sum, or None.
    """
    total = _empty(work, stage + 1) if observe_next else None
    for index, carry in enumerate(carries):
        carries[index], total = _advance(work, carry, total, stage=stage)
    return total


def _empty(work: Unit, stage: int) -> HessianSum:
    return empty(work.stages()[stage].linears[0].kernel.get_value().shape[0])


@functools.partial(jax.jit, static_argnames="stage", donate_argnames="total")
def _observe(block: Unit, carry: Carry, total: HessianSum, *, stage: int) -> HessianSum:
    return accumulate(total, block.stages()[stage].inputs(carry))


@functools.partial(jax.jit, static_argnames="stage", donate_argnames="total")
def _advance(block: Unit, carry: Carry, total: HessianSum | None, *, stage: int) -> tuple[Carry, HessianSum | None]:
    stages = block.stages()
    carry = stages[stage](carry)
    return carry, None if total is None else accumulate(total, stages[stage + 1].inputs(carry))
