"""The main job: block by block, stage by stage, one matmul pass with quantized inputs.

For every stage of a block: the Hessian of what its linears read is summed over the calibration batches, all of them are solved on
it, and the batches move on through the quantized linears. So each layer is calibrated on what the layers before it really
produce, every Hessian is made once for all linears that share it, and one block is on the device at a time.
"""

import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jgptq.errors import ConfigError, NumericalError, RuleWarning
from jgptq.models import RESIDUAL, Block, Decoder, Head, Linear, Unit, checkpoint_name
from jgptq.models.memory import copy_module, to_device
from jgptq.models.packed import PackedTensor
from jgptq.notation import Array, Int
from jgptq.run.batches import Batch, advance, cut_batches, embed, observe
from jgptq.run.plan import Plan, StagePlan, idle_rules, packed_widths, plan_decoder, unit_prefix, units
from jgptq.run.progress import Progress
from jgptq.run.report import LinearReport, Report, ReportRows
from jgptq.run.rows import kept_row, solved_row
from jgptq.run.sink import MemorySink, Sink
from jgptq.run.tiles import PreparedStage, SolvedStage, prepare_stage, solve_stage, tile_columns
from jgptq.run.tune import Lesson, tune
from jgptq.settings.presets import make_config
from jgptq.settings.run import QuantizeConfig
from jgptq.settings.solver import SolverConfig
from jgptq.solver import Outcome
from jgptq.solver.drift import StageSums


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What holds for every block."""

    config: QuantizeConfig
    dtype: jnp.dtype  # that activations and expanded kernels are computed in
    columns: Mapping[tuple[int, SolverConfig], int]  # K, a stage's settings -> columns that are solved at once


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
    """Quantizes every linear of a decoder's blocks, and its output projection on request.

    Minimizes `tr((W - Q)^T H (W - Q))` linear by linear with `H = 2/T sum_t h_t h_t^T`, where h is what the linear reads when all
    layers before it are quantized already (GPTQ, Frantar et al. 2022, with true-sequential inputs).

    Args:
      params: the decoder; leaves may be views of a mapped file, a block is read when it is quantized.
      calib: int32 token ids `[samples, seq_len]`; may be None for method "rtn", whose losses are then not measured.
      config: the settings as one object, instead of keywords.
      batch_size: samples that are run at once; by default about 4096 tokens' worth, 1024 on a CPU.
      sink: where blocks go when they are finished; by default host memory. Blocks that it holds already are not solved again.
      progress: whether to draw a progress bar; by default only on a terminal.
      **settings: fields of `QuantizeConfig`: bits, group_size, sym, method, order, damping and so on, a `preset`, and rules
        (`jgptq.Rule`s, or a dict such as `{"-:regex": {}, "+:regex": {"bits": 8}}`).

    Returns:
      The quantized decoder, which shares its other leaves with `params`, and a report with a row per linear.

    Raises:
      ConfigError: a setting that is unknown or does not fit the model.
      CalibrationError: tokens that are missing, empty, or outside the vocabulary.
      NumericalError: NaN or infinity in weights or activations, or a Hessian that cannot be factored; names the layer.
    """
    if params.quantization is not None:
        raise ConfigError("the decoder is quantized already; start from the float checkpoint")
    if config is not None and settings:
        raise ConfigError(f"give config, or the settings {', '.join(settings)}, and not both")
    config = make_config(settings) if config is None else config
    plans = plan_decoder(params, config)
    for sentence in idle_rules(params, config):
        warnings.warn(sentence, RuleWarning, stacklevel=2)
    columns = {key: tile_columns(widths) for key, widths in packed_widths(params, config, plans).items()}
    batches = cut_batches(params, calib, batch_size, need=_need_of_tokens(config, [used for _, used in columns]))
    sink = MemorySink() if sink is None else sink
    started = time.monotonic()
    finished = sink.done()
    for name, module in (params.before() | params.after()).items():
        _check_finite(name, to_device(module))
    moving = embed(params, batches, reference=config.tune > 0 or any(used.asymmetric for _, used in columns))
    run = _Run(config=config, dtype=params.config.compute_dtype, columns=columns)
    with Progress(sum(len(plan) for plan in plans), progress) as bar:
        _quantize_units(params, plans, moving, finished, sink, run, bar)
    finished = sink.done()
    blocks = [finished[index] for index in range(len(plans))]
    quantized, tuning = _assemble(params, [block for block, _ in blocks], config), None
    if config.tune:
        quantized, tuning = tune(quantized, params, _lessons(batches, moving), config.tune)
    rows, seconds = tuple(row for _, rows in blocks for row in rows), time.monotonic() - started
    return quantized, Report(config=config, rows=rows, seconds=seconds, tuning=tuning)


def _quantize_units(
    params: Decoder,
    plans: Sequence[Plan],
    batches: list[Batch],
    finished: Mapping[int, tuple[Unit, ReportRows]],
    sink: Sink,
    run: _Run,
    bar: Progress,
) -> None:
    """Quantizes the units that are not finished; batches move through the last only where something reads them after it."""
    for index, (unit, plan) in enumerate(zip(units(params, run.config), plans, strict=True)):
        last = index == len(plans) - 1 and (run.config.lm_head or not run.config.tune)
        if index in finished:
            if not last:
                _pass_through(finished[index][0], unit, plan, batches, run.dtype)
            bar.advance(f"{(unit_prefix(unit, index) or 'lm_head').rstrip('.')} was done", len(plan))
            continue
        packed, rows = _quantize_block(index, unit, plan, batches, last, run, bar)
        sink.write(index, packed, rows)


def _lessons(tokens: Sequence[np.ndarray], ends: Sequence[Batch]) -> list[Lesson]:
    """What tuning learns from: the tokens of each batch, and where the float model takes them."""
    pairs = zip(tokens, ends, strict=True)
    return [Lesson(batch, end.reference[RESIDUAL]) for batch, end in pairs if end.reference is not None]


def _need_of_tokens(config: QuantizeConfig, used: Sequence[SolverConfig]) -> str | None:
    """What needs calibration tokens, as a phrase; None where nothing does."""
    if config.tune > 0:
        return f"tuning (tune={config.tune})"
    needing = next((settings for settings in used if settings.reads_hessian), None)
    return None if needing is None else f"method {needing.method!r} with scale {needing.grid_search!r}"


def _quantize_block(
    index: int, block: Unit, plan: Sequence[StagePlan], batches: list[Batch], last: bool, run: _Run, bar: Progress
) -> tuple[Unit, ReportRows]:
    """Quantizes one block and moves the batches through it; returns it packed, with its report rows."""
    work = to_device(block)
    reference = _reference(work, batches)
    prefix = unit_prefix(block, index)
    _check_finite(prefix.rstrip("."), work)
    packed: dict[str, PackedTensor] = {}
    rows: list[LinearReport] = []
    measured = _measured(plan, batches)
    total = observe(work, reference, batches, 0, drift=plan[0].config.asymmetric) if measured[0] else None
    for number, (stage, decision) in enumerate(zip(work.stages(), plan, strict=True)):
        linears = {path: linear for path, linear in work.linears().items() if path in stage.linears}
        names = [_shown(work, prefix + path) for path in linears]
        bar.describe(f"{prefix}{' '.join(name.rpartition('.')[2] for name in names)}")
        if decision.kept_float is not None:
            rows += [kept_row(name, linear, decision.kept_float) for name, linear in zip(names, linears.values(), strict=True)]
        else:
            solved, stage_rows = _solve_stage(names, linears, total, decision.config, run)
            rows += stage_rows
            packed |= solved
        if not (last and number == len(plan) - 1):
            total = _advance(work, reference, plan, batches, number)
        bar.advance()
    return _with_kernels(block, packed), tuple(rows)


def _shown(unit: Unit, path: str) -> str:
    """What reports and errors call the linear at a path in the decoder: its name in the checkpoint without `model.`."""
    return checkpoint_name(path, unit.config.model_type).removeprefix("model.")


def _advance(work: Unit, reference: Unit, plan: Sequence[StagePlan], batches: list[Batch], number: int) -> StageSums | None:
    """Moves the batches through a stage, and sums what the plan says of the next."""
    drift = number + 1 < len(plan) and plan[number + 1].config.asymmetric
    return advance(work, reference, batches, number, observe_next=_measured(plan, batches)[number + 1], drift=drift)


def _reference(work: Unit, batches: Sequence[Batch]) -> Unit:
    """The float block: another view of the same arrays, whose kernels stay when those of `work` are replaced. Where nothing
    follows the float model, `work` itself stands in for it."""
    return copy_module(work) if _follows(batches) else work


def _follows(batches: Sequence[Batch]) -> bool:
    """Whether the float model's activations move along with the quantized one's."""
    return any(batch.reference is not None for batch in batches)


def _measured(plan: Sequence[StagePlan], batches: Sequence[Batch]) -> list[bool]:
    """Whether each stage's Hessian is summed; False for the stage after the last, which is another block's."""
    return [bool(batches) and decision.kept_float is None for decision in plan] + [False]


_finite = jax.jit(lambda leaves: [jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def _check_finite(path: str, module: nnx.Module) -> None:
    """Raises an error that names every leaf of a module that holds NaN or infinity."""
    named = jax.tree_util.tree_flatten_with_path(module)[0]
    flags = _finite([leaf for _, leaf in named])
    bad = [f"{path}{jax.tree_util.keystr(keys[:-1])}" for (keys, _), finite in zip(named, flags, strict=True) if not bool(finite)]
    if bad:
        raise NumericalError(f"{', '.join(bad)}: {Outcome.NONFINITE_WEIGHTS.message}")


def _solve_stage(
    names: Sequence[str], linears: Mapping[str, Linear], total: StageSums | None, config: SolverConfig, run: _Run
) -> tuple[dict[str, PackedTensor], list[LinearReport]]:
    """Solves the linears of a stage, and puts their expanded kernels into the block that the stage is of."""
    started = time.monotonic()
    prepared = None if total is None else prepare_stage(total, config)
    tokens = 0 if total is None else int(total.hessian.tokens)
    solved, note = _solve_checked(names, list(linears.values()), prepared, config, run)
    seconds = time.monotonic() - started
    width = sum(result.packed.shape[1] for result in solved.linears)
    packed, rows = {}, []
    for (path, linear), name, result, kernel in zip(linears.items(), names, solved.linears, solved.kernels, strict=True):
        packed[path] = result.packed
        linear.kernel.set_value(kernel)
        rows.append(solved_row(name, solved, result, note, tokens, seconds * result.packed.shape[1] / width))
    return packed, rows


def _solve_checked(
    names: Sequence[str], linears: Sequence[Linear], prepared: PreparedStage | None, config: SolverConfig, run: _Run
) -> tuple[SolvedStage, str]:
    """A usable solution and what there is to say of it; a failed solve is an error, unless the caller allowed rounding."""
    kernels = tuple(jnp.asarray(linear.kernel.get_value()) for linear in linears)
    columns = run.columns[kernels[0].shape[0], config]

    def solve(used: SolverConfig) -> SolvedStage:
        return solve_stage(kernels, prepared, used, columns=columns, dtype=run.dtype)

    solved = solve(config)
    outcome = Outcome(int(solved.outcome))
    if not outcome.failed:
        return solved, "" if outcome in (Outcome.SOLVED, Outcome.ROUNDED) else outcome.message
    rescuable = outcome in (Outcome.ZERO_HESSIAN, Outcome.NOT_FACTORED)
    if rescuable and run.config.allow_rtn_fallback:
        return solve(dataclasses.replace(config, method="rtn")), outcome.message
    hint = " To round such linears and go on, pass allow_rtn_fallback=True (--allow-rtn-fallback)." if rescuable else ""
    raise NumericalError(f"{', '.join(names)}: {outcome.message}{hint}")


def _pass_through(block: Unit, original: Unit, plan: Sequence[StagePlan], batches: list[Batch], dtype: jnp.dtype) -> None:
    """Moves the batches through a finished block exactly as the run that made it did."""
    if not batches:
        return
    work = to_device(block)
    for linear in work.linears().values():
        kernel = linear.kernel.get_value()
        if isinstance(kernel, PackedTensor):
            linear.kernel.set_value(kernel.dequantize().astype(dtype))
    reference = to_device(original) if _follows(batches) else work
    for number in range(len(plan)):
        # The sums are not needed, but the program is: another one might round otherwise, and the files would differ.
        _advance(work, reference, plan, batches, number)


def _with_kernels(block: Unit, packed: Mapping[str, PackedTensor]) -> Unit:
    """The block with some kernels replaced; every other leaf is shared with it."""
    copy = copy_module(block)
    for path, linear in copy.linears().items():
        if path in packed:
            linear.kernel = nnx.Param(packed[path])
    return copy


def _assemble(params: Decoder, blocks: Sequence[Unit], config: QuantizeConfig) -> Decoder:
    """A decoder with these blocks, and head, and the other leaves of `params`."""
    decoder = copy_module(params)
    decoder.layers = nnx.List([unit for unit in blocks if isinstance(unit, Block)])
    for unit in blocks:
        decoder.lm_head = unit.lm_head if isinstance(unit, Head) else decoder.lm_head
    decoder.quantization = config
    return decoder
