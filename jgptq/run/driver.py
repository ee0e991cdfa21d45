"""The main job: block by block, stage by stage, one matmul pass with quantized inputs.

For every stage of a block: the Hessian of what its linears read is summed over the calibration batches, all of them are solved on
it, and the batches move on through the quantized linears. So each layer is calibrated on what the quantized layers before it
produce, every Hessian is made once for all linears that share it, and one block is on the device at a time.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jgptq.errors import ConfigError, NumericalError, RuleWarning
from jgptq.models import RESIDUAL, Block, Decoder, Head, Linear, Unit, checkpoint_name, single_linears
from jgptq.models.memory import copy_module, to_device
from jgptq.models.mixture.leaves import PackedExperts
from jgptq.models.packed import PackedTensor
from jgptq.notation import Array, Int
from jgptq.run.ahead import Ahead, Program, compiled_ahead, unit_programs
from jgptq.run.batches import Batch, Observation, advance, cut_batches, embed, observe
from jgptq.run.experts.stage import Observed, solve_experts
from jgptq.run.plan import RunPlan, StagePlan, plan_run, unit_prefix
from jgptq.run.progress import Progress
from jgptq.run.report import LinearReport, Report, ReportRows, TuningReport
from jgptq.run.sink import MemorySink, Sink
from jgptq.run.stage import Job, kept_row, solve_linears
from jgptq.run.tiles import tile_columns
from jgptq.settings.presets import make_config
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import ONE_DEVICE, Outcome, Placement
from jgptq.solver.methods import method_of
from jgptq.solver.statistics.drift import StageSums


def quantize(
    params: Decoder,
    calib: Int[Array, "samples S"] | None = None,
    *,
    config: QuantizeConfig | None = None,
    batch_size: int | None = None,
    sink: Sink | None = None,
    progress: bool | None = None,
    placement: Placement = ONE_DEVICE,
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
      placement: where Hessians are summed and factored and columns solved: on one device, or `jgptq.solver.mesh.OnMesh`. The
        model itself then runs on every device of the mesh, on all tokens.
      **settings: fields of `QuantizeConfig`: bits, group_size, sym, method, order, damping and so on, a `preset`, and rules
        (`jgptq.Rule`s, or a dict such as `{"-:regex": {}, "+:regex": {"bits": 8}}`).

    Returns:
      The quantized decoder, which shares its other leaves with `params`, and a report with a row per linear.

    Raises:
      ConfigError: a setting that is unknown or does not fit the model, or a mesh for a model with experts.
      CalibrationError: tokens that are missing, empty, or outside the vocabulary.
      NumericalError: NaN or infinity in weights or activations, or a Hessian that cannot be factored; names the layer.
    """
    refuse_quantized(params)
    if config is not None and settings:
        raise ConfigError(f"give config, or the settings {', '.join(settings)}, and not both")
    if params.config.experts is not None and placement is not ONE_DEVICE:
        raise ConfigError("a model with experts is solved on one device: leave placement out; a mesh divides dense models alone")
    config = make_config(settings) if config is None else config
    run = plan_run(params, config)
    for sentence in run.idle_rules:
        warnings.warn(sentence, RuleWarning, stacklevel=3)
    tokens = cut_batches(params, calib, batch_size, need=run.needs_tokens)
    columns = {key: tile_columns(widths) for key, widths in run.widths.items()}
    job = Job(params.config.compute_dtype, columns, placement, config.allow_rtn_fallback)
    started = time.monotonic()
    sink = MemorySink() if sink is None else sink
    finished = sink.done()  # before anything is computed: a folder that cannot be written is refused here
    for name, module in (params.before() | params.after()).items():
        _check_finite(name, to_device(module))
    batches = embed(params, tokens, reference=run.follows)
    _quantize_units(run, finished, batches, sink, job, skip_last=not config.tune, progress=progress)
    finished = sink.done()
    blocks = [finished[index] for index in range(len(run.units))]
    quantized = _assemble(params, [block for block, _ in blocks], config)
    quantized, tuning = _tuned(quantized, params, tokens, batches, config.tune) if config.tune else (quantized, None)
    rows = tuple(row for _, rows in blocks for row in rows)
    return quantized, Report(config=config, rows=rows, seconds=time.monotonic() - started, tuning=tuning)


def refuse_quantized(params: Decoder) -> None:
    """Refuses a decoder whose kernels are packed already.

    Raises:
      ConfigError: they are; says how to expand them.
    """
    if params.quantization is not None:
        where = "IN" if params.origin is None else params.origin.folder
        source = "" if params.origin is None else f"{where}: "
        raise ConfigError(
            f"{source}the decoder is quantized already; start from the float checkpoint, or expand the codes first: "
            f"jgptq convert {where} OUT --format float"
        )


def _quantize_units(
    run: RunPlan,
    finished: Mapping[int, tuple[Unit, ReportRows]],
    batches: list[Batch],
    sink: Sink,
    job: Job,
    *,
    skip_last: bool,
    progress: bool | None,
) -> None:
    """Quantizes the units that are not finished, each on what those before it give; nothing is moved through the last one where
    nobody reads what leaves it."""
    programs = _programs_ahead(run, finished, batches, job, skip_last=skip_last)
    with Progress(sum(len(plan) for plan in run.plans), progress) as bar, compiled_ahead(programs) as ahead:
        for index, (unit, plan) in enumerate(zip(run.units, run.plans, strict=True)):
            last = _is_last(run, index, skip_last)
            if index not in finished:
                sink.write(index, *_quantize_unit(index, unit, plan, batches, last, job, bar, ahead))
                continue
            if not last:
                _pass_through(finished[index][0], unit, plan, batches, job)
            bar.advance(f"{(unit_prefix(unit, index) or 'lm_head').rstrip('.')} was done", len(plan))


def _tuned(
    quantized: Decoder, params: Decoder, tokens: Sequence[Any], batches: Sequence[Batch], passes: float
) -> tuple[Decoder, TuningReport]:
    """The decoder with its scales and norms tuned towards the float model's predictions on the batches."""
    from jgptq.run.tune import Lesson, float_streams, tune  # imports optax

    # With experts, the float stream next to the quantized one followed the routing of that, and the float model does not.
    streams = [batch.reference[RESIDUAL] for batch in batches if batch.reference is not None]
    streams = streams if params.config.experts is None else float_streams(params, tokens)
    return tune(quantized, params, [Lesson(*pair) for pair in zip(tokens, streams, strict=True)], passes)


def _is_last(run: RunPlan, index: int, skip_last: bool) -> bool:
    """Whether nobody reads what leaves a unit."""
    return index == len(run.units) - 1 and (skip_last or isinstance(run.units[index], Head))


def _programs_ahead(
    run: RunPlan, finished: Mapping[int, Any], batches: Sequence[Batch], job: Job, *, skip_last: bool
) -> list[Program]:
    """What the blocks that are not finished will compile. Only on one device: on a mesh, programs also depend on shardings."""
    first = next((index for index in range(len(run.units)) if index not in finished), None)
    if first is None or not batches or job.placement is not ONE_DEVICE:
        return []
    plan = run.plans[first]
    wanted = [_observation(plan, number, batches, job) for number in range(len(plan))]
    programs = unit_programs(run.units[first], plan, wanted, batches[0], job)
    return programs[:-1] if _is_last(run, first, skip_last) else programs


def _quantize_unit(
    index: int,
    block: Unit,
    plan: Sequence[StagePlan],
    batches: list[Batch],
    last: bool,
    job: Job,
    bar: Progress,
    ahead: Ahead,
) -> tuple[Unit, ReportRows]:
    """Quantizes one unit and moves the batches through it; returns it packed, with its report rows."""
    work = to_device(block)
    reference = _reference(work, batches)
    prefix = unit_prefix(block, index)
    _check_finite(prefix.rstrip("."), work)
    packed: dict[str, PackedTensor | PackedExperts] = {}
    rows: list[LinearReport] = []
    first = _observation(plan, 0, batches, job)
    total = None if first is None else observe(work, reference, batches, 0, first)
    for number, (stage, decision) in enumerate(zip(work.stages(), plan, strict=True)):
        linears = {path: linear for path, linear in work.linears().items() if path in stage.linears}
        single = [pair for path, linear in linears.items() for pair in single_linears(path, linear)]
        names = [_shown(work, prefix + path) for path, _ in single]
        bar.describe(f"{prefix}{' '.join(path.rpartition('.')[2] for path in linears)}")
        if decision.kept_float is not None:
            rows += [kept_row(name, linear, decision.kept_float) for name, (_, linear) in zip(names, single, strict=True)]
        elif stage.routing is not None:
            stacks, stage_rows = solve_experts(names, Observed(work, reference, batches, stage), decision, job)
            rows += stage_rows
            packed |= stacks
        else:
            ahead.settle("solve", number)
            plain = {path: linear for path, linear in linears.items() if isinstance(linear, Linear)}
            solved, stage_rows = solve_linears(names, plain, total, decision.config, job, pulled=decision.pulls)
            rows += stage_rows
            packed |= solved
        if not (last and number == len(plan) - 1):
            ahead.settle("move", number)
            total = _advance(work, reference, batches, number, plan, job)
        bar.advance()
    return _with_kernels(block, packed), tuple(rows)


def _shown(unit: Unit, path: str) -> str:
    """What reports and errors call the linear at a path in the decoder: its name in the checkpoint without `model.`."""
    return checkpoint_name(path, unit.config.model_type).removeprefix("model.")


def _observation(plan: Sequence[StagePlan], number: int, batches: Sequence[Batch], job: Job) -> Observation | None:
    """What is summed of a stage's inputs on their way; None for a stage that stays float or sums them itself, and after the last,
    which is another block's."""
    if not batches or number == len(plan) or plan[number].kept_float is not None or plan[number].sums_itself:
        return None
    used = plan[number].config
    pull = used.target_shift / used.residual_shift if plan[number].pulls else None
    return Observation(method_of(used).statistics.float_model, job.placement, pull)


def _reference(work: Unit, batches: Sequence[Batch]) -> Unit:
    """The float block: another view of the same arrays, whose kernels stay when those of `work` are replaced. Where nothing
    follows the float model, `work` itself stands in for it."""
    return copy_module(work) if _follows(batches) else work


def _follows(batches: Sequence[Batch]) -> bool:
    """Whether the float model's activations move along with the quantized one's."""
    return any(batch.reference is not None for batch in batches)


_finite = jax.jit(lambda leaves: [jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def _check_finite(path: str, module: nnx.Module) -> None:
    """Raises an error that names every leaf of a module that holds NaN or infinity."""
    named = jax.tree_util.tree_flatten_with_path(module)[0]
    flags = _finite([leaf for _, leaf in named])
    bad = [f"{path}{jax.tree_util.keystr(keys[:-1])}" for (keys, _), finite in zip(named, flags, strict=True) if not bool(finite)]
    if bad:
        raise NumericalError(f"{', '.join(bad)}: {Outcome.NONFINITE_WEIGHTS.message}")


def _pass_through(block: Unit, original: Unit, plan: Sequence[StagePlan], batches: list[Batch], job: Job) -> None:
    """Moves the batches through a finished block exactly as the run that made it did."""
    if not batches:
        return
    work = to_device(block)
    for linear in work.linears().values():
        kernel = linear.kernel.get_value()
        if isinstance(kernel, PackedTensor | PackedExperts):
            linear.kernel.set_value(kernel.dequantize().astype(job.dtype))
    reference = to_device(original) if _follows(batches) else work
    for number in range(len(plan)):
        # The sums are not needed, but the program is: another one might round otherwise, and the files would differ.
        _advance(work, reference, batches, number, plan, job)


def _advance(
    work: Unit, reference: Unit, batches: list[Batch], number: int, plan: Sequence[StagePlan], job: Job
) -> StageSums | None:
    """Moves the batches through a stage, and sums what the next one reads."""
    observed = _observation(plan, number, batches, job)
    pulled = observed is not None and observed.pull is not None
    return advance(work, reference, batches, number, _observation(plan, number + 1, batches, job), pulled=pulled)


def _with_kernels(block: Unit, packed: Mapping[str, PackedTensor | PackedExperts]) -> Unit:
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
