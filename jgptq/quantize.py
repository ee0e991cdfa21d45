"""The main job: block by block, stage by stage, one matmul pass with quantized inputs.

For every stage of a block: the Hessian of what its linears read is summed over the calibration batches, all of them are solved on
it, and the batches move on through the quantized linears. So each layer is calibrated on what the layers before it really
produce, every Hessian is made once for all linears that share it, and one block is on the device at a time.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jgptq.calibration import check_tokens
from jgptq.config import QuantizeConfig
from jgptq.errors import CalibrationError, ConfigError, NumericalError
from jgptq.hostmem import to_device
from jgptq.models import Block, Carry, Decoder, Stage
from jgptq.notation import Array, Float, Int
from jgptq.packed import PackedTensor, pack
from jgptq.plan import StagePlan, plan_decoder
from jgptq.progress import Progress
from jgptq.solver import Outcome, Solution, round_to_nearest, solve
from jgptq.solver.hessian import HessianSum, accumulate, empty, hessian
from jgptq.summary import KEPT_FLOAT, LinearReport, Report

BATCH_TOKENS = 4096
"""Tokens in one calibration batch, unless a single sample is longer."""

Rows = tuple[LinearReport, ...]


class Sink(Protocol):
    """Where finished blocks go, and where a repeated run finds them."""

    def done(self) -> Mapping[int, tuple[Block, Rows]]:
        """The blocks that are already there, with their report rows."""
        ...

    def write(self, index: int, block: Block, rows: Rows) -> None:
        """Takes a finished block."""
        ...


class MemorySink:
    """Keeps finished blocks in host memory."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[Block, Rows]] = {}

    def done(self) -> Mapping[int, tuple[Block, Rows]]:
        """The blocks written so far."""
        return self._blocks

    def write(self, index: int, block: Block, rows: Rows) -> None:
        """Keeps a block, its leaves moved to host memory."""
        self._blocks[index] = (jax.tree.map(np.asarray, block), rows)


def quantize(
    params: Decoder,
    calib: Int[Array, "samples S"] | None = None,
    *,
    config: QuantizeConfig | None = None,
    batch_size: int | None = None,
    sink: Sink | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> tuple[Decoder, Report]:
    """Quantizes every linear of a decoder's blocks.

    Minimizes `tr((W - Q)^T H (W - Q))` linear by linear with `H = 2/T sum_t h_t h_t^T`, where h is what the linear reads when all
    layers before it are quantized already (GPTQ, Frantar et al. 2022, with true-sequential inputs).

    Args:
      params: the decoder; leaves may be views of a mapped file, a block is read when its turn comes.
      calib: int32 token ids `[samples, seq_len]`; may be None for method "rtn", whose losses are then not measured.
      config: the settings as one object, instead of keywords.
      batch_size: samples that are run at once; by default about 4096 tokens' worth.
      sink: where blocks go when they are finished; by default host memory. Blocks that it holds already are not solved again.
      progress: whether to draw a progress bar; by default only on a terminal.
      **settings: fields of `QuantizeConfig`: bits, group_size, sym, method, order, damping, allow_rtn_fallback.

    Returns:
      The quantized decoder, which shares its other leaves with `params`, and a report with a row per linear.

    Raises:
      ConfigError: a setting that is unknown or does not fit the model.
      CalibrationError: tokens that are missing, empty, or outside the vocabulary.
      NumericalError: NaN or infinity in weights or activations, or a Hessian that cannot be factored; names the layer.
    """
    if config is not None and settings:
        raise ConfigError(f"give config, or the settings {', '.join(settings)}, and not both")
    config = make_config(settings) if config is None else config
    plans = plan_decoder(params, config)
    if params.quantization is not None:
        raise ConfigError("the decoder is quantized already; start from the float checkpoint")
    batches = _batches(params, calib, batch_size, config)
    sink = MemorySink() if sink is None else sink
    started = time.monotonic()
    finished = sink.done()
    for name, module in (("embed_tokens", params.embed_tokens), ("norm", params.norm), ("lm_head", params.lm_head)):
        if module is not None:
            _check_finite(name, to_device(module))
    carries = _embed(params, batches)
    with Progress(sum(len(plan) for plan in plans), progress) as bar:
        for index, (block, plan) in enumerate(zip(params.layers, plans, strict=True)):
            last = index == len(plans) - 1
            if index in finished:
                if not last:
                    _pass_through(finished[index][0], carries)
                bar.advance(f"layers.{index} was done", len(plan))
                continue
            packed, rows = _quantize_block(index, block, plan, carries, last, config, bar)
            sink.write(index, packed, rows)
    finished = sink.done()
    blocks = [finished[index] for index in range(len(plans))]
    report = Report(config=config, rows=tuple(row for _, rows in blocks for row in rows), seconds=time.monotonic() - started)
    return _assemble(params, [block for block, _ in blocks], config), report


def make_config(settings: Mapping[str, Any]) -> QuantizeConfig:
    """The config that keyword settings describe.

    Raises:
      ConfigError: an unknown name (those known are listed), or a value out of range.
    """
    known = [field.name for field in dataclasses.fields(QuantizeConfig)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ConfigError(f"unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
    return QuantizeConfig(**settings)


def _batches(params: Decoder, calib: Array | None, batch_size: int | None, config: QuantizeConfig) -> list[np.ndarray]:
    """The calibration tokens, checked and cut into batches of one shape, so that every program is compiled once."""
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
    limit = max(1, BATCH_TOKENS // length) if batch_size is None else batch_size
    rows = max(size for size in range(1, min(limit, samples) + 1) if samples % size == 0)
    return [tokens[start : start + rows].astype(np.int32) for start in range(0, samples, rows)]


def _embed(params: Decoder, batches: Sequence[np.ndarray]) -> list[Carry]:
    """The residual stream of every batch before the first block."""
    if not batches:
        return []
    table = to_device(params.embed_tokens)
    dtype = params.config.compute_dtype
    embed = jax.jit(lambda module, tokens: module(tokens, dtype))
    return [Carry(embed(table, jnp.asarray(tokens))) for tokens in batches]


@functools.partial(jax.jit, static_argnames="stage", donate_argnames="total")
def _observe(block: Block, carry: Carry, total: HessianSum, *, stage: int) -> HessianSum:
    """Adds what a stage's linears read to their Hessian."""
    return accumulate(total, block.stages()[stage].inputs(carry))


@functools.partial(jax.jit, static_argnames="stage")
def _advance(block: Block, carry: Carry, *, stage: int) -> Carry:
    """Moves a batch through a stage."""
    return block.stages()[stage](carry)


class _SolvedLinear(NamedTuple):
    """One linear of a solved stage."""

    packed: PackedTensor
    kernel: Float[jax.Array, "K N"]  # float32, expanded
    loss: Float[jax.Array, ""]
    rtn_loss: Float[jax.Array, ""]


class _SolvedStage(NamedTuple):
    """The linears of a stage, solved as one wide matrix."""

    linears: tuple[_SolvedLinear, ...]
    damping: Float[jax.Array, ""]
    outcome: Int[jax.Array, ""]


@functools.partial(jax.jit, static_argnames="config")
def _solve(kernels: tuple[jax.Array, ...], total: HessianSum | None, config: QuantizeConfig) -> _SolvedStage:
    """All that is computed for a stage between its Hessian's last batch and the packed result, as one program."""
    wide_kn = jnp.concatenate([kernel.astype(jnp.float32) for kernel in kernels], axis=1)
    solution = round_to_nearest(wide_kn, config) if total is None else solve(wide_kn, hessian(total), config)
    linears, start = [], 0
    for kernel in kernels:
        part = _columns(solution, start, start + kernel.shape[1])
        start += kernel.shape[1]
        zero_gn = None if config.sym else part.zero_gn
        packed = pack(part.codes_kn, part.scale_gn, zero_gn, bits=config.bits, group_size=config.group_size)
        linears.append(_SolvedLinear(packed, part.dequantize(), jnp.sum(part.loss_n), jnp.sum(part.rtn_loss_n)))
    return _SolvedStage(tuple(linears), solution.damping, solution.outcome)


def _quantize_block(
    index: int, block: Block, plan: Sequence[StagePlan], carries: list[Carry], last: bool, config: QuantizeConfig, bar: Progress
) -> tuple[Block, Rows]:
    """Quantizes one block and moves the batches through it; returns it packed, with its report rows."""
    work = to_device(block)
    _check_finite(f"layers.{index}", work)
    packed: dict[str, PackedTensor] = {}
    rows: list[LinearReport] = []
    for number, (stage, decision) in enumerate(zip(work.stages(), plan, strict=True)):
        bar.describe(f"layers.{index} {' '.join(name.rpartition('.')[2] for name in stage.names)}")
        prefix = f"layers.{index}."
        if decision.kept_float is not None:
            rows += [
                _kept_row(prefix + name, linear, decision.kept_float)
                for name, linear in zip(stage.names, stage.linears, strict=True)
            ]
        else:
            solved, stage_rows = _solve_stage(prefix, work, number, stage, carries, config)
            rows += stage_rows
            packed |= solved
        if not (last and number == len(plan) - 1):
            _advance_all(work, carries, number)
        bar.advance()
    return _with_kernels(block, packed), tuple(rows)


_finite = jax.jit(lambda leaves: [jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def _check_finite(path: str, module: nnx.Module) -> None:
    """Raises an error that names every leaf of a module that holds NaN or infinity."""
    named = jax.tree_util.tree_flatten_with_path(module)[0]
    found = _finite([leaf for _, leaf in named])
    bad = [f"{path}{jax.tree_util.keystr(keys[:-1])}" for (keys, _), finite in zip(named, found, strict=True) if not bool(finite)]
    if bad:
        raise NumericalError(f"{', '.join(bad)}: {Outcome.NONFINITE_WEIGHTS.message}")


def _solve_stage(
    prefix: str, work: Block, number: int, stage: Stage, carries: list[Carry], config: QuantizeConfig
) -> tuple[dict[str, PackedTensor], list[LinearReport]]:
    """Solves the linears of a stage, and puts their expanded kernels into `work`."""
    started = time.monotonic()
    kernels = tuple(jnp.asarray(linear.kernel.get_value()) for linear in stage.linears)
    total = empty(kernels[0].shape[0]) if carries else None
    for carry in carries:
        total = _observe(work, carry, total, stage=number)
    tokens = 0 if total is None else int(total.tokens)
    solved, note = _solve_checked(prefix, stage, kernels, total, config)
    seconds = time.monotonic() - started
    width = sum(kernel.shape[1] for kernel in kernels)
    packed, rows = {}, []
    for name, linear, result in zip(stage.names, stage.linears, solved.linears, strict=True):
        packed[name] = result.packed
        linear.kernel.set_value(result.kernel)
        rows.append(_row(prefix + name, solved, result, note, tokens, seconds * result.packed.shape[1] / width))
    return packed, rows


def _solve_checked(
    prefix: str, stage: Stage, kernels: tuple[jax.Array, ...], total: HessianSum | None, config: QuantizeConfig
) -> tuple[_SolvedStage, str]:
    """A usable solution and what there is to say of it; a failed solve is an error, unless the caller allowed rounding."""
    solved = _solve(kernels, total, config)
    outcome = Outcome(int(solved.outcome))
    if not outcome.failed:
        return solved, "" if outcome in (Outcome.SOLVED, Outcome.ROUNDED) else outcome.message
    rescuable = outcome in (Outcome.ZERO_HESSIAN, Outcome.NOT_FACTORED)
    if rescuable and config.allow_rtn_fallback:
        return _solve(kernels, total, dataclasses.replace(config, method="rtn")), outcome.message
    names = [prefix + name for name in stage.names]
    hint = " To round such linears and go on, pass allow_rtn_fallback=True (--allow-rtn-fallback)." if rescuable else ""
    raise NumericalError(f"{', '.join(names)}: {outcome.message}{hint}")


def _columns(solution: Solution, start: int, stop: int) -> Solution:
    """The part of a wide solution that belongs to one linear."""
    codes, scale, zero = (part[:, start:stop] for part in (solution.codes_kn, solution.scale_gn, solution.zero_gn))
    loss, rtn_loss = solution.loss_n[start:stop], solution.rtn_loss_n[start:stop]
    return solution._replace(codes_kn=codes, scale_gn=scale, zero_gn=zero, loss_n=loss, rtn_loss_n=rtn_loss)


def _row(name: str, stage: _SolvedStage, result: _SolvedLinear, note: str, tokens: int, seconds: float) -> LinearReport:
    k, n = result.packed.shape
    outcome = Outcome(int(stage.outcome)).name
    if tokens == 0:
        return LinearReport(name=name, k=k, n=n, outcome=outcome, note=note, seconds=seconds)
    loss, rtn_loss, damping = float(result.loss), float(result.rtn_loss), float(stage.damping)
    if loss > rtn_loss:
        note = f"{note} The loss is above that of round-to-nearest.".strip()
    return LinearReport(
        name=name,
        k=k,
        n=n,
        outcome=outcome,
        note=note,
        loss=loss,
        rtn_loss=rtn_loss,
        damping=damping,
        tokens=tokens,
        seconds=seconds,
    )


def _kept_row(name: str, linear: Any, reason: str) -> LinearReport:
    k, n = linear.kernel.get_value().shape
    return LinearReport(name=name, k=k, n=n, outcome=KEPT_FLOAT, note=f"Stays float: {reason}.")


def _pass_through(block: Block, carries: list[Carry]) -> None:
    """Moves the batches through a finished block exactly as the run that made it did."""
    if not carries:
        return
    work = to_device(block)
    for stage in work.stages():
        for linear in stage.linears:
            kernel = linear.kernel.get_value()
            if isinstance(kernel, PackedTensor):
                linear.kernel.set_value(kernel.dequantize())
    for number in range(len(work.stages())):
        _advance_all(work, carries, number)


def _advance_all(work: Block, carries: list[Carry], stage: int) -> None:
    """Moves every batch through a stage, in place, so that only one batch exists twice at a time."""
    for index, carry in enumerate(carries):
        carries[index] = _advance(work, carry, stage=stage)


def _with_kernels(block: Block, packed: Mapping[str, PackedTensor]) -> Block:
    """The block with some kernels replaced; every other leaf is shared with it."""
    copy = jax.tree.map(lambda leaf: leaf, block)
    for stage in copy.stages():
        for name, linear in zip(stage.names, stage.linears, strict=True):
            if name in packed:
                linear.kernel = nnx.Param(packed[name])
    return copy


def _assemble(params: Decoder, blocks: Sequence[Block], config: QuantizeConfig) -> Decoder:
    """A decoder with these blocks and the other leaves of `params`."""
    decoder = nnx.eval_shape(lambda: Decoder(params.config, rngs=nnx.Rngs(0)))
    decoder.embed_tokens, decoder.norm, decoder.lm_head = params.embed_tokens, params.norm, params.lm_head
    decoder.layers = nnx.List(blocks)
    decoder.origin, decoder.quantization = params.origin, config
    return decoder
