"""`vhead fit`: from a file of rollouts to a file with a head, in one run or in several."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

import vhead
from tests.fitting.examples import grouped, paired
from tests.scoring.scoring_models import critic
from tests.typer_runner import RUNNER
from vhead import Scorer, formats
from vhead.cli.app import app
from vhead.errors import InputChangedError, OutputBusyError, OutputError, ResumeError
from vhead.fitting import output as outputs
from vhead.fitting.examples import TargetFields
from vhead.fitting.files import fit_file
from vhead.fitting.fitting import FitOptions, Fitting
from vhead.fitting.output import HeadOutput
from vhead.rollouts.files.opening import open_reader
from vhead.scoring.progress import ScoringProgress

SETTINGS = {"model": "a critic"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The critic on disk."""
    path = tmp_path_factory.mktemp("critic")
    critic().save_pretrained(path)
    return path


def ids(rollout, **fields):
    mask = {} if rollout.mask is None else {"completion_mask": rollout.mask.tolist()}
    tokens = {"prompt_ids": rollout.prompt.tolist(), "completion_ids": rollout.completion.tolist()}
    return tokens | mask | fields


def written(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def drawn(seed=0, masked=True):
    """Records with a reward, returns a token, a weight and an outcome, and the rollouts that they are of."""
    rng, rollouts = np.random.default_rng(seed), grouped(masked=masked)
    records = [
        ids(
            rollout,
            reward=float(rng.normal()),
            returns=rng.normal(size=len(rollout.completion)).tolist(),
            other=float(rng.normal()),
            weight=float(rng.uniform(0, 2)),
            solved=bool(rng.random() < 0.5),
        )
        for rollout in rollouts
    ]
    return records, rollouts


def pairs_of_ids():
    return [
        {"prompt_ids": a.prompt.tolist(), "chosen_ids": a.completion.tolist(), "rejected_ids": b.completion.tolist()}
        for a, b in paired()
    ]


def run(*arguments):
    done = RUNNER.invoke(app, ["fit", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def column(records, name):
    return [record[name] for record in records]


def test_a_file_makes_the_head_that_lists_make(folder, scorer, tmp_path):
    records, rollouts = drawn()
    source, out = written(tmp_path / "in.jsonl", records), tmp_path / "head.safetensors"
    cases = {
        "returns": (["--strength", "0.5"], {"targets": column(records, "returns")}),
        "rewards": (
            ["--strength", "0.5", "--target-field", "reward", "--gamma", "0.9", "--weight-field", "weight"],
            {"targets": column(records, "reward"), "gamma": 0.9, "weights": column(records, "weight")},
        ),
        "two rewards": (
            ["--strength", "0.5", "--target", "reward", "--target-field", "reward,other"],
            {"targets": [[r["reward"], r["other"]] for r in records], "target": "reward"},
        ),
        "outcomes": (
            ["--strength", "0.5", "--target", "reward", "--target-field", "solved"],
            {"targets": column(records, "solved"), "target": "reward"},
        ),
        "two projections": (
            ["--strength", "0.5", "--intermediate-size", "4", "--max-iterations", "3", "--folds", "2"],
            {"targets": column(records, "returns"), "intermediate_size": 4, "max_iterations": 3, "folds": 2},
        ),
    }
    for name, (arguments, options) in cases.items():
        done = run(source, "--model", folder, "--output", out, "--overwrite", *arguments)
        assert done.exit_code == 0, f"{name}: {done.stderr}"
        fitted = vhead.fit(scorer, rollouts, strengths=0.5, **options)
        found = formats.load(out)
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(found.layers, fitted.head.layers, strict=True)), name
        assert sorted(path.name for path in tmp_path.iterdir()) == [".head.safetensors.journal", out.name, source.name]


def test_pairs_of_a_file_and_figures_as_json(folder, scorer, tmp_path):
    source, out = written(tmp_path / "in.jsonl", pairs_of_ids()), tmp_path / "head.safetensors"
    done = run(source, "--model", folder, "--target", "pairs", "--output", out, "--strength", "2", "--json")
    assert done.exit_code == 0, done.stderr
    fitted = vhead.fit(scorer, paired(), target="pairs", strengths=2.0)
    assert torch.equal(formats.load(out).weight, fitted.head.weight)
    found = json.loads(done.stdout)
    assert found["metrics"]["accuracy"] == fitted.metrics["accuracy"]
    assert found["metrics"]["accuracy_interval"] == list(fitted.metrics["accuracy_interval"])
    assert (found["loss"], found["rollouts"]) == ("logistic", 80)
    assert "on held-out prompts: accuracy" in done.stderr


def test_a_parquet_file_makes_the_same_head(folder, tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records, _ = drawn()
    source, table = written(tmp_path / "in.jsonl", records), tmp_path / "in.parquet"
    parquet.write_table(pa.Table.from_pylist(records), table)
    heads = []
    for name, path in (("a.safetensors", source), ("b.safetensors", table)):
        assert run(path, "--model", folder, "--output", tmp_path / name).exit_code == 0
        heads.append(formats.load(tmp_path / name))
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_a_plain_language_model_is_enough(tmp_path):
    model = critic().pretrained_model
    model.save_pretrained(tmp_path / "plain")
    source = written(tmp_path / "in.jsonl", drawn()[0])
    done = run(source, "--model", tmp_path / "plain", "--output", tmp_path / "head.bin", "--format", "llama-factory")
    assert done.exit_code == 0, done.stderr
    assert formats.load(tmp_path / "head.bin").hidden_size == 32


class StoppedError(Exception):
    """Stands for a kill."""


class StoppingReader:
    """A file whose reading stops behind so many records."""

    def __init__(self, reader, count):
        self._reader, self._count = reader, count
        self.size, self.schema = reader.size, reader.schema

    def __iter__(self):
        yield from islice(self._reader, self._count)
        raise StoppedError


KINDS = {
    "linear": (FitOptions(strengths=(0.5,)), TargetFields()),
    "reward, binary or not": (FitOptions(target="reward", strengths=(0.5,)), TargetFields(("solved",))),
    "pairs": (FitOptions(target="pairs", strengths=(0.5,)), TargetFields()),
    "two projections": (FitOptions(intermediate_size=4, max_iterations=3, folds=2, strengths=(0.5,)), TargetFields()),
}


def fitted_file(source, path, kind, *, stop=None, resume=False, limit=None):
    options, fields = KINDS[kind]
    reader = open_reader(str(source))
    try:
        with HeadOutput(path, resume=resume) as output:
            output.begin(SETTINGS)
            return fit_file(
                Scorer(critic(), chunk_tokens=150),
                reader if stop is None else StoppingReader(reader, stop),
                output,
                options=options,
                fields=fields,
                format=None,
                progress=ScoringProgress(shown=False),
                limit=limit,
            )
    finally:
        reader.close()


@pytest.fixture
def noting(monkeypatch):
    """Notes what is done after every chunk."""
    monkeypatch.setattr(outputs, "_SECONDS_BETWEEN_NOTES", 0.0)
    monkeypatch.setattr(outputs, "_NOTING_SHARE", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_continued_gives_the_same_bits(tmp_path, noting, kind):
    records = pairs_of_ids() if kind == "pairs" else drawn()[0]
    source = written(tmp_path / "in.jsonl", records)
    whole, pieces = tmp_path / "whole.safetensors", tmp_path / "pieces.safetensors"
    fitted_file(source, whole, kind)
    for count, stop in enumerate((17, 34)):
        with pytest.raises(StoppedError):
            fitted_file(source, pieces, kind, stop=stop, resume=count > 0)
        assert not pieces.exists()
        (sums,) = (tmp_path / "pieces.safetensors.partial").glob("sums-*")
        assert 0 < int(sums.stem.partition("-")[2]) < stop
    fitted_file(source, pieces, kind, resume=True)
    assert pieces.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "pieces.safetensors.partial").exists()


def interrupted(tmp_path, kind="linear"):
    """The input and the output of a run that was stopped."""
    source, out = written(tmp_path / "in.jsonl", drawn()[0]), tmp_path / "head.safetensors"
    with pytest.raises(StoppedError):
        fitted_file(source, out, kind, stop=30)
    return source, out


def test_a_run_that_was_stopped_is_not_overwritten_by_chance(tmp_path, noting):
    source, out = interrupted(tmp_path)
    with pytest.raises(OutputError, match="an earlier run stopped before it was finished; continue it with --resume"):
        fitted_file(source, out, "linear")


def test_a_run_is_continued_only_with_the_records_it_has_read(tmp_path, noting):
    source, out = interrupted(tmp_path)
    written(source, drawn(seed=1)[0])
    with pytest.raises(InputChangedError, match="records that the earlier run finished, got others"):
        fitted_file(source, out, "linear", resume=True)


def test_a_run_is_continued_only_with_its_settings(tmp_path, noting, monkeypatch):
    source, out = interrupted(tmp_path)
    monkeypatch.setitem(SETTINGS, "model", "another critic")
    with pytest.raises(ResumeError, match="model: expected 'a critic', as in the run that is resumed"):
        fitted_file(source, out, "linear", resume=True)


def test_sums_that_somebody_changed_are_refused(tmp_path, noting):
    source, out = interrupted(tmp_path)
    (sums,) = (tmp_path / "head.safetensors.partial").glob("sums-*")
    content = bytearray(sums.read_bytes())
    content[-5] ^= 1
    sums.write_bytes(content)
    with pytest.raises(ResumeError, match="expected the sums that the earlier run wrote, got others"):
        fitted_file(source, out, "linear", resume=True)


def test_states_that_are_missing_are_noticed(tmp_path, noting):
    source, out = interrupted(tmp_path, "two projections")
    (tmp_path / "head.safetensors.partial" / "states").write_bytes(b"")
    with pytest.raises(ResumeError, match="expected the states that the earlier run kept"):
        fitted_file(source, out, "two projections", resume=True)


def test_two_runs_cannot_write_one_head(tmp_path):
    out = tmp_path / "head.safetensors"
    with HeadOutput(out), pytest.raises(OutputBusyError, match="another run is writing this output"):
        HeadOutput(out, overwrite=True)
    HeadOutput(out).__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_there_is_left_alone(folder, tmp_path):
    source, out = written(tmp_path / "in.jsonl", drawn()[0]), tmp_path / "head.safetensors"
    out.write_bytes(b"somebody's")
    done = run(source, "--model", folder, "--output", out)
    assert done.exit_code == 1
    assert "expected no such file yet; replace it with --overwrite" in done.stderr
    assert out.read_bytes() == b"somebody's"
    assert run(source, "--model", folder, "--output", out, "--overwrite").exit_code == 0
    again = run(source, "--model", folder, "--output", out, "--resume")
    assert again.exit_code == 0
    assert "is finished already, so nothing was fitted" in again.stderr


def test_records_that_cannot_be_used_are_skipped_on_demand(folder, scorer, tmp_path):
    records, _ = drawn()
    records[3]["returns"] = None
    records[5]["returns"] = [*records[5]["returns"][:-1], 0.0, 0.0]
    source, out = written(tmp_path / "in.jsonl", records), tmp_path / "head.safetensors"
    failed = run(source, "--model", folder, "--output", out)
    assert failed.exit_code == 1
    assert f"{source}: line 4: returns: expected a return for each token" in failed.stderr
    done = run(source, "--model", folder, "--output", out, "--on-error", "skip")
    assert done.exit_code == 0, done.stderr
    assert "fitted to 54 rollouts, 2 skipped" in done.stderr


def test_a_record_without_the_field_says_how_another_one_is_named(folder, tmp_path):
    path = written(tmp_path / "rollouts.jsonl", [ids(rollout, score=1.0) for rollout in grouped()])
    done = run(path, "--model", folder, "--output", tmp_path / "head.safetensors")
    assert done.exit_code == 1
    assert "line 1: returns: expected" in done.stderr
    assert "got nothing; --target-field names the field that has it" in done.stderr


def test_a_format_that_cannot_hold_the_head_is_refused_before_anything_is_read(folder, tmp_path):
    source = written(tmp_path / "in.jsonl", [{"broken": True}])
    out = tmp_path / "head.safetensors"
    done = run(source, "--model", folder, "--output", out, "--format", "trl", "--target-field", "a,b")
    assert done.exit_code == 1
    assert "trl holds heads of one output" in done.stderr


@pytest.mark.parametrize("target", ["returns", "reward"])
def test_a_list_for_a_format_of_one_output_is_refused_at_the_first_record(folder, tmp_path, monkeypatch, target):
    records, _ = drawn()
    rng = np.random.default_rng(0)
    for record in records:
        count = (len(record["completion_ids"]),) if target == "returns" else ()
        record["several"] = rng.normal(size=(*count, 3)).tolist()
    source, out = written(tmp_path / "in.jsonl", records), tmp_path / "head.pt"
    given = (source, "--model", folder, "--output", out, "--target", target, "--target-field", "several")
    with monkeypatch.context() as patched:
        patched.setattr(Fitting, "add", lambda *_: pytest.fail("a record was computed"))
        done = run(*given, "--format", "trl")
    assert done.exit_code == 1
    problem = "several: expected targets for 1 output, as trl holds, got those for 3; vhead is a format that holds any"
    assert f"line 1: {problem}" in done.stderr
    assert not out.exists()
    assert run(*given, "--format", "vhead").exit_code == 0
    assert formats.load(out).num_outputs == 3


def test_a_field_with_several_numbers_makes_a_head_with_as_many_outputs(folder, scorer, tmp_path):
    records, rollouts = drawn()
    both = [[record["reward"], record["other"]] for record in records]
    source = written(tmp_path / "in.jsonl", [r | {"both": two} for r, two in zip(records, both, strict=True)])
    out = tmp_path / "head.safetensors"
    done = run(source, "--model", folder, "--output", out, "--target", "reward", "--target-field", "both")
    assert done.exit_code == 0, done.stderr
    assert torch.equal(formats.load(out).weight, vhead.fit(scorer, rollouts, both, target="reward").head.weight)


def test_an_integer_that_no_float_can_hold_is_named(folder, tmp_path):
    records, _ = drawn()
    records[3]["reward"] = 10**400
    source, out = written(tmp_path / "in.jsonl", records), tmp_path / "head.safetensors"
    arguments = (source, "--model", folder, "--output", out, "--target", "reward")
    assert f"{source}: line 4: reward: expected a number" in run(*arguments).stderr
    assert "fitted to 55 rollouts, 1 skipped" in run(*arguments, "--on-error", "skip").stderr


WRONG = {
    "an ending": (["--output", "head.txt"], "expected a name that ends in .safetensors"),
    "a format": (["--output", "h.pt", "--format", "trx"], "expected one of trl, vhead"),
    "a strength": (["--output", "h.pt", "--strength", "1,x"], "expected numbers with commas between"),
    "a negative strength": (["--output", "h.pt", "--strength", "-1"], "expected finite numbers"),
    "a loss": (["--output", "h.pt", "--loss", "logistic"], "expected squared for target"),
    "fields of pairs": (["--output", "h.pt", "--target", "pairs", "--target-field", "x"], "expected none for pairs"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_usage_is_told_before_anything_is_loaded(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    source = written(tmp_path / "in.jsonl", drawn()[0])
    arguments, message = WRONG[kind]
    done = run(source, "--model", tmp_path / "no such model", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_memory_does_not_grow_with_the_rollouts(tmp_path, monkeypatch):
    """What is held between two chunks is as large at the end as at the beginning."""
    held = []
    add = Fitting.add

    def adding(fitting, *arguments):
        add(fitting, *arguments)
        sums = sum(tensor.nbytes for tensor in fitting.tensors().values())
        held.append((sums, len(fitting.notes()["prompts"]), fitting.notes()["stored"]))

    monkeypatch.setattr(Fitting, "add", adding)
    fitted_file(written(tmp_path / "in.jsonl", drawn()[0]), tmp_path / "head.safetensors", "linear")
    assert len(held) > 5
    assert held[-1] == held[2] == (held[2][0], 5, None)
