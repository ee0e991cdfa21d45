"""Calibration batches moved through the decoder, stage by stage, and sums over what its stages read."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.data.tokens import check_tokens
from jgptq.errors import CalibrationError, ConfigError
from jgptq.models import RESIDUAL, Carry, Decoder, Unit
from jgptq.models.memory import to_device
from jgptq.notation import Array
from jgptq.solver import Placement
from jgptq.solver.statistics.drift import StageSums

CPU_BATCH_TOKENS = 1024
BATCH_TOKENS = 4096
"""Tokens in one calibration batch, unless a single sample is longer. What a batch makes on its way through a stage should fit a
CPU's cache, and fill a GPU."""


class Batch(NamedTuple):
    """The activations of a calibration batch at one point of the decoder."""

    carry: Carry  # through the quantized blocks
    reference: Carry | None  # through the float ones; None where nothing reads it


def cut_batches(params: Decoder, calib: Array | None, batch_size: int | None, *, need: str | None) -> list[np.ndarray]:
    """The calibration tokens, checked and cut into batches of one shape, so that every program is compiled once.

    Args:
      params: the decoder.
      calib: int32 token ids `[samples, seq_len]`; None for a method that needs none.
      batch_size: samples in a batch, or None for the default; made smaller until it divides the samples.
      need: what needs calibration tokens, as a phrase; None where nothing does.

    Returns:
      Batches `[b, seq_len]`.

    Raises:
      ConfigError: batch_size is less than one.
      CalibrationError: tokens that are missing, empty, or outside the vocabulary.
    """
    if calib is None:
        if need is not None:
            raise CalibrationError(f"{need} needs calibration tokens; see jgptq.calibration_tokens")
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


def embed(params: Decoder, batches: Sequence[np.ndarray], *, reference: bool) -> list[Batch]:
    """Every batch before the first block, where the quantized and the float stream are still the same."""
    if not batches:
        return []
    embedder = to_device(params.embedder())
    carries = [{RESIDUAL: _embed(embedder, jnp.asarray(tokens))} for tokens in batches]
    return [Batch(carry, carry if reference else None) for carry in carries]


_embed = jax.jit(lambda embedder, tokens: embedder.embed(tokens))


class Observation(NamedTuple):
    """What is summed of the activations that a stage's linears read."""

    drift: bool  # whether the solve reads how far the quantized model has drifted from the float one
    placement: Placement  # where the sums lie
    pull: float | None = None  # what the drift of the inputs counts in the output's; None: the inputs' drift is a sum of its own


def observe(work: Unit, reference: Unit, batches: Sequence[Batch], stage: int, wanted: Observation) -> StageSums:
    """Sums over all batches what a stage's linears read.

    Args:
      work: the block that is quantized, on the device.
      reference: the float block, on the device.
      batches: as they enter the stage.
      stage: which of the block's stages.
      wanted: what to sum.
    """
    total = empty_sums(work, stage, wanted)
    for batch in batches:
        total = _observe(work, reference, batch, total, stage=stage, wanted=wanted)
    return total


def advance(work: Unit, reference: Unit, batches: list[Batch], stage: int, wanted: Observation | None) -> StageSums | None:
    """Moves every batch through a stage, in place, so that only one batch exists twice at a time.

    Args:
      work: the block, on the device, with the kernels that the model computes with from here on.
      reference: the float block, on the device.
      batches: as they enter the stage; as they leave it, afterwards.
      stage: which of the block's stages.
      wanted: what to sum of what the next stage reads, on the way; None for nothing.

    Returns:
      The sums that `observe` would give for the next stage, or None.
    """
    total = None if wanted is None else empty_sums(work, stage + 1, wanted)
    for index, batch in enumerate(batches):
        batches[index], total = _advance(work, reference, batch, total, stage=stage, wanted=wanted)
    return total


def advance_program(
    work: Unit, reference: Unit, batch: Batch, stage: int, wanted: Observation | None
) -> tuple[Callable[[], object], Batch]:
    """A function that compiles what `advance` runs, and the batch after the stage; arguments and result hold shapes alone."""
    total = None if wanted is None else jax.eval_shape(lambda: empty_sums(work, stage + 1, wanted))
    move = functools.partial(_advance, stage=stage, wanted=wanted)
    after, _ = jax.eval_shape(move, work, reference, batch, total)
    return lambda: _advance.lower(work, reference, batch, total, **move.keywords).compile(), after


def empty_sums(work: Unit, stage: int, wanted: Observation) -> StageSums:
    """The sums over no tokens of what a stage's linears read."""
    linears = work.stages()[stage].linears
    k, n = work.linears()[linears[0]].kernel.get_value().shape
    width = n if work.stages()[stage].adds else None
    return wanted.placement.empty_sums(k, width, drift=wanted.drift, inputs=wanted.pull is None)


def _accumulate(work: Unit, reference: Unit, batch: Batch, total: StageSums, number: int, wanted: Observation) -> StageSums:
    """Adds a batch to the sums.

    With X and X_f what a linear of weights W reads in the two models, and D what the residual stream lost, a solve needs
    `X^T ((X_f - X) W a + D b)`. Either `X^T (X_f - X)`, which is K x K, and `X^T D` are summed, or, with a `pull` of a/b, the
    whole, where that is less work.
    """
    stage = work.stages()[number]
    h = work.inputs(stage, batch.carry)
    if total.drift is None or batch.reference is None:
        return wanted.placement.accumulate(total, h)
    h_float = reference.inputs(stage, batch.reference)
    lost = batch.reference[RESIDUAL].astype(jnp.float32) - batch.carry[RESIDUAL].astype(jnp.float32)
    if wanted.pull is None:
        return wanted.placement.accumulate(total, h, h_float, lost)
    off = (h_float.astype(jnp.float32) - h.astype(jnp.float32)).astype(h.dtype)
    kernel = jnp.asarray(reference.linears()[stage.linears[0]].kernel.get_value(), h.dtype)
    moved = jnp.matmul(off, kernel, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return wanted.placement.accumulate(total, h, None, lost + jnp.float32(wanted.pull) * moved)


@functools.partial(jax.jit, static_argnames=("stage", "wanted"), donate_argnames="total")
def _observe(work: Unit, reference: Unit, batch: Batch, total: StageSums, *, stage: int, wanted: Observation) -> StageSums:
    return _accumulate(work, reference, batch, total, stage, wanted)


@functools.partial(jax.jit, static_argnames=("stage", "wanted"), donate_argnames="total")
def _advance(
    work: Unit, reference: Unit, batch: Batch, total: StageSums | None, *, stage: int, wanted: Observation | None
) -> tuple[Batch, StageSums | None]:
    this = work.stages()[stage]
    carry = work.run(this, batch.carry)
    followed = None if batch.reference is None else {**reference.run(this, batch.reference), **this.decisions(carry)}
    batch = Batch(carry, followed)
    if total is None or wanted is None:
        return batch, None
    return batch, _accumulate(work, reference, batch, total, stage + 1, wanted)
