"""`jgptq quantize`: a checkpoint to a GPTQ folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jgptq.app.command import CompileCache, Dtype, Model, Revision, SeqLen, print_table, takes_options_of
from jgptq.app.compile_cache import compile_cache
from jgptq.settings.run import QuantizeConfig

if TYPE_CHECKING:
    from jgptq.run.report import Report


@takes_options_of(QuantizeConfig)
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: wikitext, c4, code, medical or finance; a dataset owner/name; .txt .jsonl .parquet .npy."
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="fast, balanced or best: more time for less loss, at no cost when served. Other options replace its values."
        ),
    ] = "balanced",
    rules: Annotated[
        Path | None,
        typer.Option(help='JSON file of rules; the first match wins: {"-:regex": {}} skips, {"+:regex": {"bits": 8}} overrides.'),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 512,
    seq_len: SeqLen = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the random choice of samples.")] = 0,
    dtype: Dtype = "auto",
    revision: Revision = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples in a batch; by default as many as hold 4096 tokens, on a CPU 1024.")
    ] = None,
    file_format: Annotated[
        str, typer.Option("--format", help="gptq (v1, symmetric), gptq_v2, or compressed-tensors (4 and 8 bits).")
    ] = "gptq",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of one file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace OUT, or an unfinished run of other settings, if it exists.")] = False,
    cache: CompileCache = True,
    **given: Any,
) -> None:
    """Quantize a checkpoint to a GPTQ folder.

    The same command again resumes a stopped run after its last finished block.

    Example: jgptq quantize Qwen/Qwen3-0.6B out --calib wikitext --bits 4 --group-size 128
    """
    from converters.output.folders import refuse_existing
    from converters.sink import check_streamed
    from jgptq.settings.presets import make_config
    from jgptq.settings.rules import rules_from_file

    config = make_config({"preset": preset, "rules": () if rules is None else rules_from_file(rules), **given})
    check_streamed(file_format, config)
    refuse_existing(out, overwrite)
    with compile_cache(cache):
        import jgptq
        from converters import FolderSink, load_hf
        from jgptq.run.driver import refuse_quantized

        params = load_hf(model, dtype, revision)
        refuse_quantized(params)
        tokens = None if calib is None else jgptq.calibration_tokens(calib, params.tokenizer_path, samples, seq_len, seed)
        sink = FolderSink(
            out,
            params,
            config,
            tokens,
            file_format=file_format,
            max_shard_size=max_shard_size,
            batch_size=batch_size,
            overwrite=overwrite,
        )
        qparams, report = jgptq.quantize(params, tokens, config=config, batch_size=batch_size, sink=sink)
        folder = sink.finish(qparams, report)
    _print_report(report, folder)


def _print_report(report: "Report", folder: Path) -> None:
    from jgptq.app.report import linear_table

    print_table(linear_table(report))
    typer.echo(f"wrote {folder}: {len(report.rows) - len(report.kept_float)} linears packed, {report.seconds:.1f} s")
    if report.tuning is not None:
        verdict = "" if report.tuning.kept else "; it did not fall, so nothing was changed"
        typer.echo(
            f"tuning: divergence from the float model {report.tuning.before:.4f} to {report.tuning.after:.4f} nats{verdict}"
        )
    if report.kept_float:
        typer.echo(f"{len(report.kept_float)} linears stay float, see the table and {folder / 'quantize_report.json'}")
