"""`vhead compare`: its tables, its document and its exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.typer_runner import RUNNER
from vhead.cli.app import app

TEXT = "Saved \x1b[31mby\nthe bell"


def run(*arguments: str, columns: int = 80):
    return RUNNER.invoke(app, ["compare", *arguments], env={"COLUMNS": str(columns)})


@pytest.fixture
def scored(tmp_path: Path) -> str:
    """Records with hostile text and a hostile id, whose two columns differ by noise."""
    rng = np.random.default_rng(4)
    path = tmp_path / "scores.jsonl"
    lines = []
    for at in range(60):
        logprobs = -rng.exponential(1, 8)
        record = {
            "id": f"{at}\x1b[2J\x7f" + "long " * 30,
            "completion": TEXT,
            "token_offsets": [[at, at + 2] for at in range(0, 16, 2)],
            "logprobs": logprobs.tolist(),
            "old_logprobs": (logprobs + 0.3 * rng.normal(size=8)).tolist(),
            "values": rng.normal(size=8).tolist(),
            "reward": float(rng.normal()),
        }
        lines.append(json.dumps(record))
    path.write_text("\n".join([*lines, ""]))
    return str(path)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("files", [1, 2])
def test_tables_fit_the_terminal_and_hold_nothing_that_it_obeys(scored: str, columns: int, files: int) -> None:
    done = run(*[scored] * files, columns=columns)
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert all(line.isprintable() for line in done.stdout.splitlines())
    assert "Log-probabilities of 480 tokens" in done.stdout
    assert ("Tokens that differ most" in done.stdout) == (files == 1)
    assert ("Values and rewards" in done.stdout) == (files == 2)
    assert ("None of the known causes fits." if files == 1 else "The two agree") in done.stdout


def test_the_document_is_json_with_stable_keys(scored: str) -> None:
    done = run(scored, "--json", "--worst", "2")
    assert all(line.isprintable() for line in done.stdout.splitlines())
    document = json.loads(done.stdout)
    names = "rollouts tokens logprobs values reward cause by_id only_ours only_theirs left_out problems"
    assert list(document) == names.split()
    assert len(document["logprobs"]["worst"]) == 2
    assert document["logprobs"]["worst"][0]["token"] in TEXT
    assert document["cause"]["name"] is None


def test_numbers_that_are_infinite_are_null_in_the_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"logprobs": [-1, -2], "old_logprobs": [-1000, -2]}\n')
    document = json.loads(run(str(path), "--json").stdout)
    assert document["logprobs"]["k3"] is None
    assert document["logprobs"]["max_abs"] == 999


def test_a_limit_that_is_exceeded_is_said_and_fails(scored: str) -> None:
    assert run(scored, "--fail-above", "k3=0.5", "--fail-above", "max_abs=10").exit_code == 0
    done = run(scored, "--fail-above", "k3=0.001")
    assert done.exit_code == 1
    assert "vhead: k3: expected at most 0.001, got 0.0" in done.stderr
    # Its sign is no reason to pass.
    assert [run(scored, "--fail-above", f"{name}=0").exit_code for name in ("k1", "chi2", "outside")] == [1, 1, 1]


def test_a_limit_fails_where_something_could_not_be_compared(scored: str, tmp_path: Path) -> None:
    lines = Path(scored).read_text().splitlines()
    part = tmp_path / "part.jsonl"
    part.write_text("\n".join(lines[1:]) + "\n")
    assert run(scored, str(part)).exit_code == 0
    done = run(scored, str(part), "--fail-above", "k3=10")
    assert done.exit_code == 1
    assert "expected all records to be compared, got 0 left out, 1 in ours only and 0 in theirs only" in done.stderr


@pytest.mark.parametrize("limit", ["k3", "k3=much", "reward=1", "k3=nan"])
def test_a_limit_of_another_form_is_wrong_usage(scored: str, limit: str) -> None:
    done = run(scored, "--fail-above", limit)
    assert done.exit_code == 2
    assert "--fail-above" in done.stderr


def test_what_cannot_be_read_is_one_line_and_exit_code_1(scored: str, tmp_path: Path) -> None:
    done = run(scored, str(tmp_path / "none.jsonl"))
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "none.jsonl: No such file" in done.stderr
    done = run(scored, "--theirs", "engine")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "engine: expected a column of log-probabilities" in done.stderr


def test_standard_input_is_refused(scored: str) -> None:
    assert run(scored, "-").exit_code == 2
