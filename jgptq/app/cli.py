"""The command line: `jgptq quantize`, `jgptq eval`, `jgptq demo`."""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from jgptq.errors import JgptqError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Model = Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")]
SeqLen = Annotated[int, typer.Option(help="Tokens in one sample or window.")]
Dtype = Annotated[str, typer.Option(help="Dtype of activations: auto (the checkpoint's), float32 or bfloat16.")]


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Prints an error of ours as one message and exits with 1; any other is a defect and keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except JgptqError as error:
            typer.echo(f"error: {error.strerror if isinstance(error, OSError) and error.strerror else error}", err=True)
            raise typer.Exit(1) from None

    return wrapped


@app.callback()
def main() -> None:
    """GPTQ quantization of large language models in JAX."""


@app.command()
@_reports_errors
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a preset (wikitext, c4, code, medical, finance), owner/name, or .txt .jsonl .parquet .npy."
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="fast, balanced or best: more time for less loss, at no cost when served. Options below win over it."),
    ] = "balanced",
    bits: Annotated[int, typer.Option(help="Bits of a weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Rows that share a scale: a multiple of 32, or -1 for all.")] = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric grid, which every reader serves, or asymmetric.")] = True,
    method: Annotated[str | None, typer.Option(help="gptq, gptaq, qronos, or rtn: round-to-nearest.")] = None,
    order: Annotated[
        str | None, typer.Option(help="Order of rows: group, static or none (free when served), or desc_act (needs g_idx).")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="Search of scales: hessian, mse or minmax.")] = None,
    target_shift: Annotated[
        float | None, typer.Option(help="Fraction of what earlier layers lost that is made up for, 0 to 1.")
    ] = None,
    residual_shift: Annotated[
        float | None, typer.Option(help="The same for the residual stream that a linear adds to, 0 to 1.")
    ] = None,
    refine: Annotated[int | None, typer.Option(help="Rounds of coordinate descent over codes and scales.")] = None,
    refit: Annotated[bool | None, typer.Option("--refit/--no-refit", help="Re-fit scales once for the codes found.")] = None,
    tune: Annotated[float | None, typer.Option(help="Passes of gradient descent on scales and norms at the end.")] = None,
    damping: Annotated[float | None, typer.Option(help="Added to the Hessian's diagonal, as a fraction of its mean.")] = None,
    float64: Annotated[bool | None, typer.Option("--float64/--float32", help="Precision of the solver.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 512,
    seq_len: SeqLen = 2048,
    file_format: Annotated[str, typer.Option("--format", help="gptq (v1, symmetric) or gptq_v2.")] = "gptq",
    seed: Annotated[int, typer.Option(help="Seed of the choice of samples.")] = 0,
    dtype: Dtype = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Samples run at once; by default about 4096 tokens' worth, 1024 on a CPU.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of one file at most.")] = "5GB",
    allow_rtn_fallback: Annotated[bool, typer.Option(help="Round a linear that cannot be solved, instead of stopping.")] = False,
    rules: Annotated[
        Path | None,
        typer.Option(help='JSON file of rules, the first match wins: {"-:regex": {}} skips, {"+:regex": {"bits": 8}} overrides.'),
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output projection as well.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT, or the rest of another run, if it exists.")] = False,
) -> None:
    """Quantize a checkpoint to a GPTQ folder.

    A run that was stopped goes on where it was when the same command is given again.

    Example: jgptq quantize Qwen/Qwen3-0.6B out --calib wikitext --bits 4 --group-size 128
    """
    import jgptq
    from converters import FolderSink, load_hf
    from converters.quantization import check_format
    from converters.shards import refuse_existing
    from jgptq.app.report import linear_table
    from jgptq.settings.presets import make_config
    from jgptq.settings.rules import rules_from_file

    options = {
        "method": method,
        "order": order,
        "scale": scale,
        "target_shift": target_shift,
        "residual_shift": residual_shift,
        "refine": refine,
        "refit": refit,
        "tune": tune,
        "damping": damping,
        "float64": float64,
    }
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym, "allow_rtn_fallback": allow_rtn_fallback}
    settings |= {"rules": () if rules is None else rules_from_file(rules), "lm_head": lm_head}
    config = make_config({"preset": preset} | settings | {name: value for name, value in options.items() if value is not None})
    checked = check_format(file_format, config)
    refuse_existing(out, overwrite)
    params = load_hf(model, dtype)
    tokens = None if calib is None else jgptq.calibration_tokens(calib, params.tokenizer_path, samples, seq_len, seed)
    sink = FolderSink(
        out,
        params,
        config,
        tokens,
        file_format=checked,
        max_shard_size=max_shard_size,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    qparams, report = jgptq.quantize(params, tokens, config=config, batch_size=batch_size, sink=sink)
    folder = sink.finish(qparams, report)
    _print(linear_table(report))
    typer.echo(f"wrote {folder}: {len(report.rows) - len(report.kept_float)} linears packed, {report.seconds:.1f} s")
    if report.tuning is not None:
        verdict = "" if report.tuning.kept else "; it did not fall, so nothing was changed"
        typer.echo(
            f"tuning: divergence from the float model {report.tuning.before:.4f} to {report.tuning.after:.4f} nats{verdict}"
        )
    if report.kept_float:
        typer.echo(f"{len(report.kept_float)} linears stay float, see the table and {folder / 'quantize_report.json'}")


@app.command("eval")
@_reports_errors
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Text, as for --calib; presets give their test split.")],
    seq_len: SeqLen = 2048,
    stride: Annotated[int | None, typer.Option(help="Step between windows; by default they do not overlap.")] = None,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line.")] = False,
) -> None:
    """Measure the perplexity of a checkpoint, float or quantized.

    Example: jgptq eval out --data wikitext --seq-len 2048 --json
    """
    import jgptq
    from converters import load_hf
    from jgptq.evaluate.perplexity import score

    params = load_hf(model, dtype)
    tokens = jgptq.evaluation_tokens(data, params.tokenizer_path)
    started = time.monotonic()
    result = score(params, tokens, seq_len, stride)
    fields = {
        "model": model,
        "data": data,
        "perplexity": result.perplexity,
        "nll": result.nll,
        "tokens": result.tokens,
        "seq_len": seq_len,
        "stride": stride,
        "seconds": round(time.monotonic() - started, 3),
    }
    typer.echo(json.dumps(fields) if as_json else f"perplexity {result.perplexity:.4f} over {result.tokens} tokens")


@app.command()
@_reports_errors
def demo(
    model: Annotated[str | None, typer.Option(help="Checkpoint; by default the embedded model.")] = None,
    calib: Annotated[str | None, typer.Option(help="Calibration text; by default the Python standard library.")] = None,
    data: Annotated[str | None, typer.Option(help="Evaluation text; by default held-out files of it.")] = None,
    group_size: Annotated[int, typer.Option(help="Rows that share a scale.")] = 128,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 256,
    seq_len: SeqLen = 256,
    out: Annotated[Path | None, typer.Option(help="Keep the 4-bit export here.")] = None,
) -> None:
    """Compare float, round-to-nearest and GPTQ at 4, 3 and 2 bits, then read the 4-bit export back.

    Example: jgptq demo --out tinycode-int4
    """
    from converters import load_hf
    from converters.shards import refuse_existing
    from jgptq import tinycode
    from jgptq.app.demo import DemoFailed, check_order, compare, demo_tokens, export_and_reload, sources
    from jgptq.app.report import comparison_table

    if out is not None:
        refuse_existing(out, overwrite=False)
    folder = model or tinycode.FOLDER
    calib_text, eval_text = sources(folder, calib, data)
    rows, tokens = demo_tokens(folder, calib_text, eval_text, samples, seq_len)
    variants, exported = [], None
    for variant, params in compare(load_hf(folder), rows, tokens, seq_len, group_size, (4, 3, 2)):
        typer.echo(f"{variant.method} {variant.bits}: perplexity {variant.perplexity:.4f}", err=True)
        variants.append(variant)
        if (variant.method, variant.bits) == ("GPTQ", "4"):
            exported = (params, variant.perplexity)
    _print(comparison_table(f"{Path(folder).name}: group {group_size}, {len(tokens)} held-out tokens", variants))
    if exported is None:
        raise DemoFailed("no 4-bit model was made")
    where, reloaded = export_and_reload(exported[0], out, tokens, seq_len)
    typer.echo(f"4-bit export {where if out else ''} read back: perplexity {reloaded:.4f}, in memory {exported[1]:.4f}")
    if reloaded != exported[1]:
        raise DemoFailed("the export does not give the perplexity of the model that was exported")
    check_order(variants)


def _print(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    app()
