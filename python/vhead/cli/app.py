"""The commands and what they share."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from vhead.cli.bench import bench
from vhead.cli.compare import compare
from vhead.cli.convert import convert
from vhead.cli.demo import demo
from vhead.cli.environment import environment
from vhead.cli.fit import fit
from vhead.cli.score import score
from vhead.cli.serve import serve
from vhead.cli.sync import sync
from vhead.cli.terminal import escaped, show

# What `BadParameter` is a kind of: click's class, or typer's own where typer no longer needs click.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


class _Commands(TyperGroup):
    """Commands whose usage errors are escaped like all messages, because they quote the arguments."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            error.message = escaped(error.message)
            raise


# A new command is one more entry, and a module that parses and prints.
COMMANDS: dict[str, Callable[..., object]] = {
    "score": score,
    "fit": fit,
    "serve": serve,
    "compare": compare,
    "convert": convert,
    "sync": sync,
    "demo": demo,
    "bench": bench,
    "env": environment,
}


def app_of(commands: dict[str, Callable[..., object]]) -> typer.Typer:
    """The command line with these commands."""
    made = typer.Typer(
        name="vhead",
        cls=_Commands,
        help="Score rollouts with a language model and its value head.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Example: `vhead score rollouts.jsonl --model ./critic --output scores.parquet`",
    )
    for name, command in commands.items():
        made.command(name)(command)
    made.callback()(options)
    return made


def _show_version(asked: bool) -> None:  # noqa: FBT001, typer's callbacks take a value
    if asked:
        show(f"vhead {version('vhead')}")
        raise typer.Exit


def options(
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Score rollouts with a language model and its value head."""


app = app_of(COMMANDS)
