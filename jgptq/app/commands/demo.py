"""`jgptq demo`: compares float, round-to-nearest and GPTQ, and loads an export again."""

from pathlib import Path
from typing import Annotated

import typer

from jgptq.app.command import CompileCache, SeqLen, print_table
from jgptq.app.compile_cache import compile_cache


def demo(
    model: Annotated[str | None, typer.Option(help="Checkpoint; by default the embedded model.")] = None,
    calib: Annotated[str | None, typer.Option(help="Calibration text; by default the Python standard library.")] = None,
    data: Annotated[str | None, typer.Option(help="Evaluation text; by default held-out files of it.")] = None,
    group_size: Annotated[int, typer.Option(help="Rows that share a scale.")] = 128,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 256,
    seq_len: SeqLen = 256,
    out: Annotated[Path | None, typer.Option(help="Keep the 4-bit export here.")] = None,
    cache: CompileCache = True,
) -> None:
    """Compare float, round-to-nearest and GPTQ at 4, 3 and 2 bits, then read the 4-bit export back.

    Example: jgptq demo --out tinycode-int4
    """
    from converters.output.folders import refuse_existing

    if out is not None:
        refuse_existing(out, overwrite=False)
    with compile_cache(cache):
        _run(model, calib, data, group_size, samples, seq_len, out)


def _run(
    model: str | None, calib: str | None, data: str | None, group_size: int, samples: int, seq_len: int, out: Path | None
) -> None:
    from converters import load_hf
    from jgptq import tinycode
    from jgptq.app.demo import DemoFailed, check_order, compare, demo_tokens, export_and_reload, sources
    from jgptq.app.report import comparison_table

    folder = model or tinycode.FOLDER
    calib_text, eval_text = sources(folder, calib, data)
    rows, tokens = demo_tokens(folder, calib_text, eval_text, samples, seq_len)
    variants, exported = [], None
    for variant, params in compare(load_hf(folder), rows, tokens, seq_len, group_size, (4, 3, 2)):
        typer.echo(f"{variant.method} {variant.bits}: perplexity {variant.perplexity:.4f}", err=True)
        variants.append(variant)
        if (variant.method, variant.bits) == ("GPTQ", "4"):
            exported = (params, variant.perplexity)
    print_table(comparison_table(f"{Path(folder).name}: group {group_size}, {len(tokens)} held-out tokens", variants))
    if exported is None:
        raise DemoFailed("no 4-bit model was made")
    where, reloaded = export_and_reload(exported[0], out, tokens, seq_len)
    typer.echo(f"4-bit export {where if out else ''} read back: perplexity {reloaded:.4f}, in memory {exported[1]:.4f}")
    if reloaded != exported[1]:
        raise DemoFailed("the export does not give the perplexity of the model that was exported")
    check_order(variants)
