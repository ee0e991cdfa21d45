"""The public function: our decoders go through the staged driver, every other model through its traced computation."""

from collections.abc import Callable
from typing import Any, TypeVar

from jgptq.errors import ConfigError
from jgptq.models import Decoder
from jgptq.run.driver import quantize as quantize_decoder
from jgptq.run.report import Report
from jgptq.run.sink import Sink
from jgptq.run.traced.driver import quantize_traced
from jgptq.settings.run import QuantizeConfig
from jgptq.solver import ONE_DEVICE, Placement

Params = TypeVar("Params")


def quantize(
    params: Params,
    calib: Any = None,
    *,
    apply: Callable[[Any, Any], Any] | None = None,
    config: QuantizeConfig | None = None,
    batch_size: int | None = None,
    sink: Sink | None = None,
    progress: bool | None = None,
    placement: Placement = ONE_DEVICE,
    **settings: Any,
) -> tuple[Params, Report]:
    """Quantizes the linears of a model, each on what it reads when all layers before it are quantized.

    Minimizes `tr((W - Q)^T H (W - Q))` linear by linear with `H = 2/T sum_t h_t h_t^T`, where h is what the linear reads (GPTQ,
    Frantar et al. 2022, with true-sequential inputs).

    Args:
      params: a decoder of `converters.load_hf`, whose blocks are quantized; or an NNX module, a pair `(Linen module, params)`, or
        a pytree of arrays, whose linears are found in the traced computation.
      calib: int32 token ids `[samples, seq_len]`; may be None for a decoder and method "rtn", whose losses are then not measured.
        For other models what they take as a batch, with more samples: arrays that are cut along their first axis.
      apply: a function of `params` and a batch that is traced; may be None for a module, which is then called on the batch. A
        decoder with `apply` is traced like any other module.
      config: the settings as one object, instead of keywords.
      batch_size: samples that are run at once, made smaller until it divides their number; by default about 4096 tokens' worth,
        1024 on a CPU.
      sink: where blocks of a decoder go when they are finished; by default host memory. Blocks that it holds already are not
        solved again.
      progress: whether to draw a progress bar; by default only on a terminal.
      placement: for a decoder, where Hessians are summed and factored and columns solved: on one device, or
        `jgptq.solver.mesh.OnMesh`. The model itself then runs on every device of the mesh, on all tokens.
      **settings: fields of `QuantizeConfig`: bits, group_size, sym, method, order, damping and so on, a `preset`, and rules
        (`jgptq.Rule`s, or a dict such as `{"-:regex": {}, "+:regex": {"bits": 8}}`).

    Returns:
      The model with packed weights, which shares its other leaves with `params`, and a report with a row per linear.

    Raises:
      ConfigError: a setting that is unknown or does not fit the model, or a model in which no linear is found.
      CalibrationError: tokens that are missing, empty, or outside the vocabulary; arrays that differ in the number of samples.
      NumericalError: NaN or infinity in weights or activations, or a Hessian that cannot be factored; names the layer.
    """
    shared: dict[str, Any] = {"config": config, "batch_size": batch_size, "progress": progress, **settings}
    quantized: Any
    if isinstance(params, Decoder) and apply is None:
        quantized, report = quantize_decoder(params, calib, sink=sink, placement=placement, **shared)
        return quantized, report
    if refused := [name for name, given in (("sink", sink), ("placement", placement)) if given not in (None, ONE_DEVICE)]:
        raise ConfigError(f"{' and '.join(refused)} cannot be used with a model that is traced: it runs on one device, in memory")
    quantized, report = quantize_traced(params, calib, apply=apply, **shared)
    return quantized, report
