"""Outputs under attack: a kill at every file operation, many kills of a process, and two writers at once."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.attack.killing import killed_at
from tests.attack.scale import scaled
from tests.scoring.files.score_file_cases import content, scores_of
from tests.typer_runner import RUNNER
from vhead.cli.app import app
from vhead.demo import demo_model_path
from vhead.errors import VheadError
from vhead.rollouts.files.opening import open_reader
from vhead.scoring.files import output as outputs
from vhead.scoring.files.opening import open_output
from vhead.scoring.files.part import GrowingFile

# A field whose type widens on the way, three records to a chunk.
CHUNK = 3
FIELDS = [1, None, 0.5, 2, 3, 0.25, 7]
FORMATS = [("in.jsonl", "out.jsonl"), ("in.jsonl", "out.parquet"), ("in.parquet", "out.parquet")]


def make_input(path: Path) -> None:
    records = [{"id": f"r{i}", "prompt": "a", "completion": "b", "x": x} for i, x in enumerate(FIELDS)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def score(source: Path, target: Path, *, resume: bool = False, overwrite: bool = False) -> bool:
    """What `vhead score` does, with scores that depend on the record alone; says whether there was something to do."""
    with (
        contextlib.closing(open_reader(str(source))) as reader,
        open_output(str(target), resume=resume, overwrite=overwrite) as output,
    ):
        output.begin({"model": "m"}, reader.schema)
        rows = iter(reader)
        if output.finished:
            output.journal.check_whole(rows, str(target))
            return False
        for _ in output.journal.pass_over(rows):
            pass
        last = None
        while chunk := list(itertools.islice(rows, CHUNK)):
            last = chunk[-1]
            output.write(chunk, scores_of(*[1 + row.count % 3 for row in chunk], seed=last.count), last)
        output.publish(last, scores_of())
        return True


@pytest.fixture(autouse=True)
def every_window_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing waits for the disk: what a process wrote outlives it without that."""
    monkeypatch.setattr(outputs, "_SECONDS_BETWEEN_NOTES", 0.0)
    monkeypatch.setattr(os, "fsync", lambda file: None)


def points(source: Path, folder: Path, name: str, **options: bool) -> list[str]:
    """The file operations of a run that nobody kills."""
    folder.mkdir()
    prepare(folder / name, **options)
    with killed_at(None) as killer:
        score(source, folder / name, **options)
    return killer.done


def prepare(target: Path, *, overwrite: bool = False) -> None:
    """What an earlier run left, where a run is to replace it."""
    if overwrite:
        with open_output(str(target)) as output:
            output.begin({"model": "earlier"})
            output.publish(None, scores_of())


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(("source", "name"), FORMATS)
@pytest.mark.parametrize("torn", [False, True], ids=["before", "torn"])
def test_a_run_that_is_killed_at_any_file_operation_is_finished_by_the_next(tmp_path, source, name, torn, overwrite):
    make_input(tmp_path / source)
    operations = points(tmp_path / source, tmp_path / "whole", name, overwrite=overwrite)
    whole = (tmp_path / "whole" / name).read_bytes()
    assert {"open", "write", "fsync", "replace"} <= set(operations)
    tried = [at for at, operation in enumerate(operations) if not torn or operation == "write"]
    step = max(1, len(tried) // scaled(8, len(tried)))
    for at in tried[len(name) % step :: step]:
        folder = tmp_path / f"at{at}"
        folder.mkdir()
        target = folder / name
        prepare(target, overwrite=overwrite)
        old = target.read_bytes() if overwrite else None
        with killed_at(at, torn=torn) as killer:
            score(tmp_path / source, target, overwrite=overwrite)
        assert len(killer.done) == at, "the run was not killed"
        assert (target.read_bytes() if target.exists() else None) in (old, whole), "half an output was visible"
        score(tmp_path / source, target, resume=True, overwrite=overwrite)
        assert target.read_bytes() == whole, f"killed at {at}: {operations[at]}"
        assert sorted(os.listdir(folder)) == [f".{name}.journal", name], f"killed at {at}: {operations[at]}"


@pytest.mark.parametrize(("source", "name"), FORMATS)
def test_a_resumed_run_that_is_killed_again_is_finished_too(tmp_path, source, name):
    make_input(tmp_path / source)
    operations = points(tmp_path / source, tmp_path / "whole", name)
    whole = (tmp_path / "whole" / name).read_bytes()
    generator = random.Random(0)
    for attempt in range(scaled(20, 400)):
        target = tmp_path / f"attempt{attempt}" / name
        target.parent.mkdir()
        for _ in range(4):
            with killed_at(generator.randrange(len(operations)), torn=generator.random() < 0.5):
                score(tmp_path / source, target, resume=True)
        score(tmp_path / source, target, resume=True)
        assert target.read_bytes() == whole


def test_a_finished_output_is_recognised_wherever_the_last_kill_was(tmp_path):
    make_input(tmp_path / "in.jsonl")
    operations = points(tmp_path / "in.jsonl", tmp_path / "whole", "out.jsonl")
    last_replace = len(operations) - 1 - operations[::-1].index("replace")
    for at in range(last_replace + 1, len(operations)):
        target = tmp_path / f"at{at}" / "out.jsonl"
        target.parent.mkdir()
        with killed_at(at):
            score(tmp_path / "in.jsonl", target)
        assert target.exists()
        assert not score(tmp_path / "in.jsonl", target, resume=True), "it was scored again"


@pytest.mark.parametrize("broken", ["a part that is not read again", "a name that comes too early"])
def test_the_kill_can_be_noticed(tmp_path, monkeypatch, broken):
    """Control."""
    make_input(tmp_path / "in.jsonl")
    if broken == "a name that comes too early":
        monkeypatch.setattr(outputs.OutputFile, "_claimed", lambda self: GrowingFile(self.path))
        monkeypatch.setattr(outputs.OutputFile, "_complete", lambda self, nothing: self._note_published(self._part))
    else:
        monkeypatch.setattr(GrowingFile, "cut", lambda self, length: os.lseek(self._file, 0, os.SEEK_END) >= 0)
    with pytest.raises((AssertionError, VheadError)):
        test_a_run_that_is_killed_at_any_file_operation_is_finished_by_the_next(
            tmp_path, "in.jsonl", "out.jsonl", torn=True, overwrite=False
        )


def options(source: Path, target: Path) -> list[str]:
    budget = ["--token-budget", "64", "--chunk-tokens", "512", "--returns", "values,reward", "--num-threads", "1"]
    return ["score", str(source), "-m", str(demo_model_path()), "-o", str(target), *budget]


def make_rollouts(path: Path, count: int) -> None:
    lines = [
        {
            "id": i,
            "prompt": "The statement ",
            "completion": f"is number {i % 97}.",
            "x": i / 2 if i % 3 else i,
        }
        for i in range(count)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_process_that_is_killed_at_any_time_is_finished_by_the_next(tmp_path, name):
    source, target, whole = tmp_path / "in.jsonl", tmp_path / name, tmp_path / f"whole_{name}"
    make_rollouts(source, scaled(600, 6000))
    assert RUNNER.invoke(app, options(source, whole)).exit_code == 0
    generator = random.Random(1)
    kills = 0
    while kills < scaled(1, 150):
        for file in (target, target.with_name(f".{name}.journal")):
            file.unlink(missing_ok=True)
        for _ in range(scaled(1, 5)):
            command = [sys.executable, "-m", "vhead", *options(source, target), "--resume"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            wait_until_begun(process, target)
            time.sleep(generator.random() * scaled(1, 4))
            process.send_signal(signal.SIGKILL)
            stderr = process.communicate()[1]
            assert process.returncode in (0, -signal.SIGKILL), stderr.decode()
            kills += process.returncode != 0
            if process.returncode == 0:
                break
        done = RUNNER.invoke(app, [*options(source, target), "--resume"])
        assert done.exit_code == 0, done.stderr
        assert target.read_bytes() == whole.read_bytes()


def wait_until_begun(process: subprocess.Popen, target: Path) -> None:
    """Until there are scores in the part, or the output is there."""
    part = target.with_name(f"{target.name}.partial")
    while process.poll() is None and not (target.exists() or (part.exists() and part.stat().st_size)):
        time.sleep(0.01)


RACER = """
import sys, time
from vhead.errors import VheadError
from vhead.scoring.files.opening import open_output
from tests.scoring.files.score_file_cases import lines_of, scores_of, write_in_chunks

rows = lines_of(*({{"tag": {tag!r}, "n": n}} for n in range(50)))
while time.time() < {start}:
    pass
try:
    with open_output({target!r}) as output:
        output.begin({{}})
        write_in_chunks(output, rows)
        output.publish(rows[-1], scores_of())
except VheadError as error:
    sys.exit(str(error))
"""


def race(target: Path) -> list[tuple[int, str]]:
    """Two writers at once: how each ended, and what it said."""
    start = time.time() + 3
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER.format(target=str(target), tag=tag, start=start)],
            cwd=Path(__file__).parent.parent.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for tag in "ab"
    ]
    said = [racer.communicate()[1] for racer in racers]
    return [(racer.returncode, text) for racer, text in zip(racers, said, strict=True)]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_of_two_writers_one_wins_whole_and_the_other_is_told(tmp_path, name):
    for attempt in range(scaled(1, 10)):
        target = tmp_path / f"{attempt}_{name}"
        ends = race(target)
        assert sorted(code for code, _ in ends) == [0, 1], ends
        (winner,) = (tag for tag, (code, _) in zip("ab", ends, strict=True) if code == 0)
        (told,) = (text for code, text in ends if code)
        assert "another run is writing this output" in told or "expected no such file yet" in told, told
        assert [(record["tag"], record["n"]) for record in content(target)] == [(winner, n) for n in range(50)]
        assert sorted(os.listdir(tmp_path)) == sorted(
            entry for done in range(attempt + 1) for entry in (f".{done}_{name}.journal", f"{done}_{name}")
        )
