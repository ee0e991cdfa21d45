"""`jgptq convert`: a checkpoint to a folder of another format."""

from pathlib import Path
from typing import Annotated

import typer

from jgptq.app.command import Model


def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    file_format: Annotated[
        str, typer.Option("--format", help="gptq (v1, symmetric), gptq_v2, compressed-tensors (4 and 8 bits), float, or orbax.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="With --format float, the dtype of all tensors: float32, bfloat16 or float16. By default float32 for a "
            "quantized checkpoint, which is exact; a float checkpoint keeps its own."
        ),
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Round weights that the dtype does not hold, instead of refusing.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of one file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a checkpoint in another format, with the same codes, scales and zero points.

    Example: jgptq convert out out-ct --format compressed-tensors
    """
    import converters

    folder = converters.convert(
        model, out, file_format, dtype=dtype, lossy=lossy, max_shard_size=max_shard_size, overwrite=overwrite
    )
    typer.echo(f"wrote {folder} as {file_format}")
