"""The command `vhead`."""

import sys

_OPTIONAL = ("typer", "rich", "click")


def main() -> None:
    """Runs the command line; exits with 0 (done), 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    try:
        from vhead.cli.app import app  # noqa: PLC0415, what it needs is optional
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OPTIONAL:
            raise
        sys.exit(f"vhead: {error.name} is not installed; the command line needs: pip install 'vhead[cli]'")
    app()
