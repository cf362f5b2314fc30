"""The command `vhead`."""

import signal
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
    # A scheduler that ends the process gets what an interrupt gets: the part that is done is kept and named.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
