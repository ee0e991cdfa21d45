"""The command line: `jgptq quantize`, `jgptq eval`, `jgptq convert`, `jgptq push`, `jgptq demo`."""

import typer

from jgptq.app.command import reports_errors
from jgptq.app.commands.convert import convert
from jgptq.app.commands.demo import demo
from jgptq.app.commands.evaluate import evaluate
from jgptq.app.commands.push import push
from jgptq.app.commands.quantize import quantize

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def main() -> None:
    """GPTQ quantization of large language models in JAX."""


app.command("quantize")(reports_errors(quantize))
app.command("eval")(reports_errors(evaluate))
app.command("convert")(reports_errors(convert))
app.command("push")(reports_errors(push))
app.command("demo")(reports_errors(demo))

if __name__ == "__main__":
    app()
