"""`vhead score --follow`: the weights that score are those of the directory, and the output says of which step."""

import json

import pytest
import torch

from tests.typer_runner import RUNNER
from vhead import AutoModelForCausalLMWithValueHead
from vhead.cli.app import app
from vhead.sync import Publisher


def run(*arguments):
    return RUNNER.invoke(app, ["score", *map(str, arguments), "--device", "cpu", "--returns", "reward"])


@pytest.fixture
def trained(critic):
    """The critic after an update of its head."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(critic)
    with torch.no_grad():
        model.v_head.summary.weight.normal_()
    return model


def rewards(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_newest_weights_score_and_are_named(critic, source, trained, tmp_path):
    Publisher(tmp_path / "weights").publish(trained, step=7)
    followed, own, saved = (tmp_path / f"{name}.jsonl" for name in ("followed", "own", "saved"))
    done = run(source, "-m", critic, "-o", followed, "--follow", tmp_path / "weights", "--min-step", 7)
    assert done.exit_code == 0, done.stderr
    assert run(source, "-m", critic, "-o", own).exit_code == 0
    trained.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "tokenizer_config.json").write_text((critic / "tokenizer_config.json").read_text())
    assert run(source, "-m", tmp_path / "trained", "-o", saved).exit_code == 0
    assert {row["weights_step"] for row in rewards(followed)} == {7}
    assert [row["reward"] for row in rewards(followed)] == [row["reward"] for row in rewards(saved)]
    assert [row["reward"] for row in rewards(followed)] != [row["reward"] for row in rewards(own)]


def test_weights_that_do_not_come_are_an_error(critic, source, trained, tmp_path):
    Publisher(tmp_path / "weights").publish(trained, step=7)
    follow = ("--follow", tmp_path / "weights", "--min-step", 8, "--patience", 0.1)
    done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", *follow)
    assert done.exit_code == 1
    assert "expected weights of step 8 or later" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_broken_publication_is_told_of_and_the_weights_stay(critic, source, trained, tmp_path):
    Publisher(tmp_path / "weights").publish(trained, step=7)
    (file,) = (tmp_path / "weights" / "step-00000007").glob("*.safetensors")
    broken = bytearray(file.read_bytes())
    broken[-3] ^= 1
    file.write_bytes(broken)
    out, own, refused = (tmp_path / f"{name}.jsonl" for name in ("out", "own", "refused"))
    done = run(source, "-m", critic, "-o", out, "--follow", tmp_path / "weights")
    assert done.exit_code == 0, done.stderr
    assert run(source, "-m", critic, "-o", own).exit_code == 0
    assert {row["weights_step"] for row in rewards(out)} == {-1}
    assert [row["reward"] for row in rewards(out)] == [row["reward"] for row in rewards(own)]
    done = run(source, "-m", critic, "-o", refused, "--follow", tmp_path / "weights", "--min-step", 7)
    assert done.exit_code == 1
    assert not refused.exists()
