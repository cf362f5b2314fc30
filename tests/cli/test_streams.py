"""Standard streams that are closed, full or broken: one line where somebody can read it, and a true exit code."""

import os
import subprocess
import sys

import pytest

VERSION = ("--version",)
SCORE = ("score", "-", "--model", "unused", "--output", "-")
CLOSED, FULL = "Bad file descriptor", "No space left on device"


def run(arguments, redirection):
    """A command under a shell's redirection: exit code, standard output, standard error."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "vhead", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "redirection", "code", "error"),
    [
        (VERSION, ">&-", 1, f"standard output: {CLOSED}"),
        (VERSION, ">/dev/full", 1, f"standard output: {FULL}"),
        (("--help",), ">&-", 1, f"standard output: {CLOSED}"),
        (("--help",), ">/dev/full", 1, f"standard output: {FULL}"),
        (SCORE, ">&-", 1, f"standard output: {CLOSED}"),
        (SCORE, "<&-", 1, f"standard input: {CLOSED}"),
        (VERSION, "<&-", 0, None),
        (SCORE, "<&- 2>&-", 1, None),
        (SCORE, "<&- 2>/dev/full", 1, None),
        (VERSION, "2>&-", 0, None),
        (SCORE, "0>/dev/null", 1, f"standard input: {CLOSED}"),
    ],
)
def test_a_stream_that_cannot_be_used_is_one_line_and_a_code(arguments, redirection, code, error):
    expected = "" if error is None else f"vhead: {error}\n"
    assert run(arguments, redirection)[::2] == (code, expected)


def test_a_reader_that_has_gone_is_one_line_and_a_code():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "vhead", "--version"]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    code = (
        "import os, sys\nfrom vhead.cli.terminal import open_closed_streams\n"
        "open_closed_streams()\n"
        f"file = os.open({str(tmp_path / 'scores')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "os.write(2, b'what a library prints')\nos._exit(file)"
    )
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code], check=False)
    assert done.returncode > 2
    assert (tmp_path / "scores").read_bytes() == b""
