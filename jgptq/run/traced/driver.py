"""The job on a model that is not ours: trace it, find its linears, quantize each on what the quantized ones before it give."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.errors import CalibrationError, ConfigError, RuleWarning
from jgptq.run.batches import BATCH_TOKENS, CPU_BATCH_TOKENS
from jgptq.run.progress import Progress
from jgptq.run.report import KEPT_FLOAT, LinearReport, Report
from jgptq.run.stage import Job
from jgptq.run.traced.plan import TracedPlan, columns_of, groups_of, plan_traced
from jgptq.run.traced.walk import Place, Walk
from jgptq.settings.presets import make_config
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import ONE_DEVICE
from jgptq.solver.methods import method_of
from jgptq.trace.evaluate import Streams
from jgptq.trace.model import Model, Traced, cut_samples, model_of, trace
from jgptq.trace.packed_array import PackedArray, stacked
from jgptq.trace.segments import Cut, cut


def quantize_traced(
    params: Any,
    calib: Any,
    *,
    apply: Callable[[Any, Any], Any] | None = None,
    config: QuantizeConfig | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> tuple[Any, Report]:
    """Quantizes the linears that are found in the traced computation of a model.

    A linear is a product of one array of the tree with what depends on the batch. In the order of execution, each is solved on
    what it reads when all before it are quantized; linears that read the same value share a Hessian.

    Args:
      params: an NNX module, a pair `(Linen module, params)`, or a pytree of arrays.
      calib: what the model takes as a batch, with more samples: arrays that are cut along their first axis.
      apply: a function of `params` and a batch; may be None for a module, which is then called on the batch.
      config: the settings as one object, instead of keywords.
      batch_size: samples that are run at once; made smaller until it divides the samples. By default about 4096 tokens' worth,
        1024 on a CPU, where the second axis of the first array counts tokens.
      progress: whether to draw a progress bar; by default only on a terminal.
      **settings: fields of `QuantizeConfig`, and a `preset`; not `tune` and `lm_head`.

    Returns:
      `params` with a `PackedArray` in place of every weight that was quantized, and a report: a row for every linear, and for
      every other float array, with the reason why it stays float.

    Raises:
      ConfigError: a setting that is unknown or does not fit, a model that cannot be traced, or one without a linear.
      CalibrationError: no samples, or arrays that differ in their number.
      NumericalError: NaN or infinity in weights or activations, or a Hessian that cannot be factored; names the linear.
    """
    if config is not None and settings:
        raise ConfigError(f"give config, or the settings {', '.join(settings)}, and not both")
    config = make_config(settings) if config is None else config
    _check_settings(config)
    if calib is None:
        raise CalibrationError("a model that is traced needs calib, if only for the shapes of a batch")
    started = time.monotonic()
    model = model_of(params, apply)
    batches = cut_samples(calib, batch_size, tokens_at_once=CPU_BATCH_TOKENS if jax.default_backend() == "cpu" else BATCH_TOKENS)
    traced = trace(model, batches[0])
    plan = plan_traced(model, traced, config)
    for sentence in plan.idle_rules:
        warnings.warn(sentence, RuleWarning, stacklevel=3)
    pieces = cut(traced.program, traced.contents, plan.settings.keys())
    walk = _walked(model, traced, plan, pieces, batches, config, progress)
    arrays = list(model.arrays)
    for leaf, layers in walk.packed.items():
        dtype = traced.program.avals[traced.program.inputs[leaf]].dtype
        packed = stacked([layers[index] for index in sorted(layers)], plan.lengths[leaf])
        arrays[leaf] = PackedArray(packed=packed, layout=plan.linears[leaf].w_kn, dtype=np.dtype(dtype))
    rows = (*walk.rows, *(_kept_row(model, leaf, reason) for leaf, reason in plan.kept_float.items()))
    return model.rebuild(arrays), Report(config=config, rows=rows, seconds=time.monotonic() - started)


def _check_settings(config: QuantizeConfig) -> None:
    """Refuses the settings that only a decoder of `jgptq.models` has a meaning for."""
    if config.tune:
        raise ConfigError(
            f"tune={config.tune} trains the scales and norms of a jgptq.models.Decoder, and cannot be used with apply=fn, whose "
            "norms are not known; pass tune=0, also with preset='best'"
        )
    if config.lm_head:
        raise ConfigError("lm_head=True has no meaning for a traced model: its output projection is a linear like the others")


def _walked(
    model: Model, traced: Traced, plan: TracedPlan, pieces: Cut, samples: list[Any], config: QuantizeConfig, progress: bool | None
) -> Walk:
    """A finished walk over the model."""
    program, count = traced.program, len(model.arrays)
    follows = any(method_of(used).statistics.float_model for used in plan.settings.values())
    weights = dict(zip(program.inputs[:count], model.arrays, strict=True)) | dict(program.constants)
    inputs = [dict(zip(program.inputs[count:], map(jnp.asarray, jax.tree.leaves(batch)), strict=True)) for batch in samples]
    batches = [Streams(batch, batch if follows else None) for batch in inputs]
    dtypes = {number: (program.avals[number].dtype,) for number in program.inputs[:count]}
    job = Job(np.dtype(np.float32), columns_of(pieces, plan.settings), ONE_DEVICE, config.allow_rtn_fallback)
    with Progress(sum(times for _, times in groups_of(pieces)), progress) as bar:
        walk = Walk(model.names, plan.settings, job, bar)
        walk.run(pieces, Streams(weights, weights if follows else None), batches, Place(layers=(), dtypes=dtypes))
    return walk


def _kept_row(model: Model, leaf: int, reason: str) -> LinearReport:
    """The row of an array that stays float: all axes but the last as one, and the last."""
    shape = model.arrays[leaf].shape
    n = shape[-1] if shape else 1
    return LinearReport(
        name=model.names[leaf], k=int(np.prod(shape[:-1])), n=int(n), outcome=KEPT_FLOAT, note=f"Stays float: {reason}."
    )
