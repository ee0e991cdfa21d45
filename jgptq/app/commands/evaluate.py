"""`jgptq eval`: the perplexity of a checkpoint."""

import json
import time
from typing import Annotated

import typer

from jgptq.app.command import CompileCache, Dtype, Model, Revision, SeqLen
from jgptq.app.compile_cache import compile_cache


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Text, as for `quantize --calib`; a named dataset gives its test split.")],
    seq_len: SeqLen = 2048,
    stride: Annotated[int | None, typer.Option(help="Step between windows; by default they do not overlap.")] = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line.")] = False,
    cache: CompileCache = True,
) -> None:
    """Measure the perplexity of a checkpoint, float or quantized.

    Example: jgptq eval out --data wikitext --seq-len 2048 --json
    """
    with compile_cache(cache):
        import jgptq
        from converters import load_hf
        from jgptq.evaluate.perplexity import score

        params = load_hf(model, dtype, revision)
        tokens = jgptq.evaluation_tokens(data, params.tokenizer_path)
        started = time.monotonic()
        result = score(params, tokens, seq_len, stride)
        seconds = round(time.monotonic() - started, 3)
    fields = {
        "model": model,
        "data": data,
        "perplexity": result.perplexity,
        "nll": result.nll,
        "tokens": result.tokens,
        "seq_len": seq_len,
        "stride": stride,
        "seconds": seconds,
    }
    typer.echo(json.dumps(fields) if as_json else f"perplexity {result.perplexity:.4f} over {result.tokens} tokens")
