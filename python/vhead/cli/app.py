"""The commands and what they share."""

from importlib.metadata import version
from typing import Annotated

import typer

from vhead.cli.bench import bench
from vhead.cli.convert import convert
from vhead.cli.demo import demo
from vhead.cli.environment import environment
from vhead.cli.score import score

app = typer.Typer(
    name="vhead",
    help="Score rollouts with a language model and its value head.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: `vhead score rollouts.jsonl --model ./critic --output scores.parquet`",
)
app.command("score")(score)
app.command("convert")(convert)
app.command("demo")(demo)
app.command("bench")(bench)
app.command("env")(environment)


def _show_version(asked: bool) -> None:  # noqa: FBT001, typer's callbacks take a value
    if asked:
        typer.echo(f"vhead {version('vhead')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Score rollouts with a language model and its value head."""
