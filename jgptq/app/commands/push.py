"""`jgptq push`: a finished folder to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    out: Annotated[Path, typer.Argument(help="Folder that quantize or convert wrote; its README.md becomes the model card.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub; it is made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; by default the main one.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
) -> None:
    """Upload a folder to the Hugging Face hub, as the user that `hf auth login` logged in.

    Example: jgptq push out me/Qwen3-0.6B-int4 --private
    """
    from converters.hub import push_to_hub

    typer.echo(push_to_hub(out, repo_id, private=private, revision=revision, message=message))
