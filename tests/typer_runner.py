"""Runs commands inside the test's process."""

from inspect import signature

from typer.testing import CliRunner

# Before click 8.2, standard error had to be kept apart on demand.
RUNNER = CliRunner(**{"mix_stderr": False} if "mix_stderr" in signature(CliRunner.__init__).parameters else {})
