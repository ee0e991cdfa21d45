"""What the commands share: arguments, options derived from declared settings, the printing of errors and tables."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from jgptq.errors import JgptqError
from jgptq.settings.options import Option, allowed, flag, options

Model = Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id; by default its main branch.")]
SeqLen = Annotated[int, typer.Option(help="Tokens in one sample or window.")]
Dtype = Annotated[str, typer.Option(help="Dtype of activations: auto (the checkpoint's), float32 or bfloat16.")]
CompileCache = Annotated[
    bool,
    typer.Option(
        "--compile-cache/--no-compile-cache", help="Keep compiled programs in the user's cache folder, for the next run."
    ),
]


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Prints a `JgptqError` as one message and exits with 1; any other exception is a defect and keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except JgptqError as error:
            typer.echo(f"error: {error.strerror if isinstance(error, OSError) and error.strerror else error}", err=True)
            raise typer.Exit(1) from None

    return wrapped


def takes_options_of(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option for each option that a settings class declares, in place of its `**given`.

    The command receives the options that the user gave; the others keep the value of the preset or the default.
    """
    declared = [_parameter(field, options(settings)[field.name]) for field in _option_fields(settings)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]

        @functools.wraps(command)
        def wrapped(**values: Any) -> None:
            names = {parameter.name for parameter in declared}
            given = {name: value for name, value in values.items() if name in names and value is not None}
            command(**{name: value for name, value in values.items() if name not in names}, **given)

        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own] + declared
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return decorate


def _option_fields(settings: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(settings) if field.name in options(settings)]


def _parameter(field: dataclasses.Field[Any], declared: Option) -> inspect.Parameter:
    """The parameter of a command for one option; its default None means that the user did not give it."""
    kind = str if field.default is None else type(field.default)
    shown = False if field.default is None else _shown_default(field.default, declared)
    values = allowed(declared)
    text = declared.help + (f" {values[0].upper()}{values[1:]}." if values else "")
    info = typer.Option(flag(field.name, declared, field.default), help=text, show_default=shown)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def _shown_default(default: Any, declared: Option) -> str:
    """A default as the help shows it: that of a switch with names of its own is the name of its state."""
    if not isinstance(default, bool):
        return str(default)
    if declared.flag is None:
        return "on" if default else "off"
    return declared.flag.split("/")[0 if default else 1].removeprefix("--")


def print_table(table: Any) -> None:
    """Prints a table of rich, as wide as the terminal, or 160 columns where there is none."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)
