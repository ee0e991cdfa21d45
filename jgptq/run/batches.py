"""Calibration batches moved through the decoder, stage by stage, and sums over what its stages read."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.data.tokens import check_tokens
from jgptq.errors import CalibrationError, ConfigError
from jgptq.models import RESIDUAL, Carry, Decoder, Linear, Stage, Unit
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
    reference: Carry | None  # through the float ones, as `Observation.pull` says; None where nothing reads it


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
    carries = [{RESIDUAL: _embed(embedder, jax.device_put(tokens))} for tokens in batches]
    return [Batch(carry, carry if reference else None) for carry in carries]


_embed = jax.jit(lambda embedder, tokens: embedder.embed(tokens))


class Observation(NamedTuple):
    """What is summed of the activations that a stage's linears read."""

    drift: bool  # whether the solve reads how far the quantized model has drifted from the float one
    placement: Placement  # where the sums lie
    pull: float | None = None
    """How much the drift of the inputs counts, next to what the residual stream lost, where both are one sum: that of what the
    stage gives in the float model, which therefore is through it already when the quantized one enters it. None where the
    drift of the inputs is a sum of its own."""


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


def advance(
    work: Unit, reference: Unit, batches: list[Batch], stage: int, wanted: Observation | None, *, pulled: bool = False
) -> StageSums | None:
    """Moves every batch through a stage, in place, so that only one batch exists twice at a time.

    Args:
      work: the block, on the device, with the kernels that the model computes with from here on.
      reference: the float block, on the device.
      batches: as they enter the stage; as they leave it, afterwards.
      stage: which of the block's stages.
      wanted: what to sum of what the next stage reads, on the way; None for nothing.
      pulled: whether this stage was observed with a pull, so that the float model is through it.

    Returns:
      The sums that `observe` would give for the next stage, or None.
    """
    total = None if wanted is None else empty_sums(work, stage + 1, wanted)
    for index, batch in enumerate(batches):
        batches[index], total = _advance(work, reference, batch, total, stage=stage, wanted=wanted, pulled=pulled)
    return total


def advance_program(
    work: Unit, reference: Unit, batch: Batch, stage: int, wanted: Observation | None, *, pulled: bool
) -> tuple[Callable[[], object], Batch]:
    """A function that compiles what `advance` runs, and the batch after the stage; arguments and result hold shapes alone."""
    total = None if wanted is None else jax.eval_shape(lambda: empty_sums(work, stage + 1, wanted))
    move = functools.partial(_advance, stage=stage, wanted=wanted, pulled=pulled)
    after, _ = jax.eval_shape(move, work, reference, batch, total)
    return lambda: _advance.lower(work, reference, batch, total, **move.keywords).compile(), after


def empty_sums(work: Unit, stage: int, wanted: Observation) -> StageSums:
    """The sums over no tokens of what a stage's linears read."""
    linears = work.stages()[stage].linears
    k, n = work.linears()[linears[0]].kernel.get_value().shape
    width = n if work.stages()[stage].adds else None
    return _empty_sums(k, width, wanted.drift, wanted.pull is None, wanted.placement)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty_sums(k: int, width: int | None, drift: bool, inputs: bool, placement: Placement) -> StageSums:
    return placement.empty_sums(k, width, drift=drift, inputs=inputs)


def _accumulate(
    work: Unit, reference: Unit, batch: Batch, total: StageSums, number: int, wanted: Observation
) -> tuple[Carry | None, StageSums]:
    """Adds a batch to the sums.

    With X and X_f what a linear of weights W reads in the two models, and D what the residual stream lost, a solve needs
    `X^T ((X_f - X) W a + D b)`. Either `X^T (X_f - X)`, which is K x K, and `X^T D` are summed, or, with a `pull` of a/b,
    `X^T (X_f W a/b + D)`: the solver knows `X^T X W`, and X_f W is what the float model computes next in any case.

    Returns:
      The float model's carry, which is through the stage where there is a pull, and the sums.
    """
    stage = work.stages()[number]
    h = work.inputs(stage, batch.carry)
    if total.drift is None or batch.reference is None:
        return batch.reference, wanted.placement.accumulate(total, h)
    lost = batch.reference[RESIDUAL].astype(jnp.float32) - batch.carry[RESIDUAL].astype(jnp.float32)
    if wanted.pull is None:
        h_float = reference.inputs(stage, batch.reference)
        return batch.reference, wanted.placement.accumulate(total, h, h_float, lost)
    outputs = reference.outputs(stage, batch.reference)
    given = jnp.float32(wanted.pull) * _without_bias(reference, stage, outputs)
    return reference.combine(stage, batch.reference, outputs), wanted.placement.accumulate(total, h, None, lost + given)


def _without_bias(unit: Unit, stage: Stage, outputs: Mapping[str, jax.Array]) -> jax.Array:
    """`h W` of a stage of one linear, float32."""
    (path,) = stage.linears
    linear, output = unit.linears()[path], outputs[path].astype(jnp.float32)
    bias = linear.bias if isinstance(linear, Linear) else None
    return output if bias is None else output - jnp.asarray(bias.get_value(), jnp.float32)[None, None]


@functools.partial(jax.jit, static_argnames=("stage", "wanted"), donate_argnames="total")
def _observe(work: Unit, reference: Unit, batch: Batch, total: StageSums, *, stage: int, wanted: Observation) -> StageSums:
    return _accumulate(work, reference, batch, total, stage, wanted)[1]


@functools.partial(jax.jit, static_argnames=("stage", "wanted", "pulled"), donate_argnames="total")
def _advance(
    work: Unit,
    reference: Unit,
    batch: Batch,
    total: StageSums | None,
    *,
    stage: int,
    wanted: Observation | None,
    pulled: bool,
) -> tuple[Batch, StageSums | None]:
    this = work.stages()[stage]
    carry, through = work.run(this, batch.carry), batch.reference
    if through is not None:
        through = {**(through if pulled else reference.run(this, through)), **this.decisions(carry)}
    batch = Batch(carry, through)
    if total is None or wanted is None:
        return batch, None
    through, total = _accumulate(work, reference, batch, total, stage + 1, wanted)
    return Batch(carry, through), total
