"""What reaches a terminal is one line of printable characters and bounded length, whoever wrote it."""

import json
import unicodedata

import pytest

from tests.typer_runner import RUNNER
from vhead.cli import terminal
from vhead.cli.app import app

# Colours, a title, a forged line, C1's own escape, text direction, line separators, half a surrogate pair.
HOSTILE = "a\x1b[31m\x1b]0;title\x07\r\nvhead: 5 rollouts scored\x9b2J\u202e\u2066\u2028\u2029\x85\x7f\ud800"


def is_harmless(line: str) -> bool:
    return all(unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} for character in line)


def test_the_check_can_fail():
    assert not is_harmless("\x1b[31m")
    assert not is_harmless("two\nlines")
    assert is_harmless("naïve 日本語 'quoted'")


@pytest.mark.parametrize("speak", [terminal.say, terminal.show])
def test_a_hostile_text_is_one_harmless_line(capsys, speak):
    speak(HOSTILE)
    captured = capsys.readouterr()
    line = captured.err.removeprefix("vhead: ") + captured.out
    assert line.count("\n") == 1
    assert is_harmless(line[:-1])
    assert r"a\x1b[31m\x1b]0;title\x07\r\nvhead: 5 rollouts scored\x9b2J\u202e" in line


def test_ordinary_text_of_any_language_stays_as_it_is():
    text = "Größe, 大きさ, размер: 'a' \\ \"b\" 🙂"
    assert terminal.escaped(text) == text


def test_a_long_text_is_cut():
    line = terminal.escaped("é" * 40_000_000)
    assert len(line) < 5000
    assert line.endswith("é... (cut off, of 40,000,000 characters)")


def test_what_the_terminal_s_encoding_lacks_is_escaped(monkeypatch, capfdbinary):
    with open(1, "w", encoding="ascii", closefd=False) as stream:
        monkeypatch.setattr("sys.stdout", stream)
        terminal.show("é 🙂")
    assert capfdbinary.readouterr().out == b"\\xe9 \\U0001f642\n"


def test_a_record_cannot_forge_a_line(critic, source, tmp_path):
    source.write_text(json.dumps({HOSTILE: 1, "prompt": 5, "completion": "x", "id": HOSTILE}) + "\n")
    with source.open("a") as stream:
        stream.write(json.dumps({f"{HOSTILE}{number}": 1 for number in range(10_000)}) + "\n")
    arguments = ["score", source, "-m", critic, "-o", tmp_path / "out.jsonl", "--on-error", "skip", "--device", "cpu"]
    done = RUNNER.invoke(app, list(map(str, arguments)))
    *skipped, total, nothing = done.stderr.splitlines()
    assert [line[:15] for line in skipped] == ["vhead: skipped "] * 2
    assert total.startswith("vhead: 0 rollouts scored, 2 skipped")
    assert nothing == "vhead: no record could be scored, so the output has none"
    assert done.exit_code == 1
    assert all(is_harmless(line) and len(line) < 5000 for line in skipped)


def test_a_file_s_name_cannot_forge_a_line(tmp_path):
    done = RUNNER.invoke(app, ["score", str(tmp_path / HOSTILE[:-1]), "-m", "unused", "-o", "out.jsonl"])
    assert done.exit_code == 2
    assert "\x1b" not in done.stderr
    assert not any(line.startswith("vhead:") for line in done.stderr.splitlines())


def test_logs_warnings_and_tracebacks_go_through_the_same_door(fresh_python):
    code = f"""
import logging, sys, warnings
from vhead.cli.terminal import route_messages
sys.stderr = sys.stdout
route_messages()
logging.getLogger("some.package").warning("log %s", {HOSTILE!r})
warnings.warn({HOSTILE!r})
try:
    raise RuntimeError({HOSTILE!r})
except RuntimeError:
    sys.excepthook(*sys.exc_info())
"""
    lines = fresh_python(code).split("\n")
    assert all(is_harmless(line) for line in lines), lines
    assert lines[0].startswith("vhead: log a\\x1b")
    assert lines[1].startswith("vhead: UserWarning: a\\x1b")
    assert lines[-2].startswith("RuntimeError: a\\x1b[31m")
    assert lines[-1].startswith("  vhead: 5 rollouts scored\\x9b")
