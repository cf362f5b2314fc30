"""Preference pairs in files: both sides scored, side by side, with the margin between their rewards."""

import json
import subprocess
import time
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import ByT5Tokenizer

from tests.cli.test_cli_score import bad_line, read_jsonl, run
from tests.scoring.files.score_file_cases import scores_of
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer, ValueHead
from vhead.rollouts.files.opening import open_reader
from vhead.scoring.files.opening import open_output
from vhead.scoring.files.pairs import PairScores
from vhead.scoring.files.pipeline import score_file
from vhead.scoring.progress import ScoringProgress

FORMATS = pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
COLUMNS = [f"{name}_{side}" for side in ("chosen", "rejected") for name in ("values", "logprobs", "reward")]


def rows_of(path):
    return read_jsonl(path) if path.suffix == ".jsonl" else pq.read_table(path).to_pylist()


@pytest.fixture
def pairs():
    return [
        {"id": f"r{at}", "prompt": "Why? " * (1 + at % 3), "chosen": "yes " * (at + 1), "rejected": "no " * (12 - at)}
        for at in range(12)
    ]


@pytest.fixture
def source(tmp_path, pairs):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    return path


@pytest.fixture
def single(critic, pairs):
    """What two runs over the sides as rollouts of their own give."""
    scorer = Scorer.from_pretrained(critic, device="cpu")
    return [
        scorer.score([Rollout(pair["prompt"], pair[side]) for pair in pairs], ("values", "logprobs", "reward"))
        for side in ("chosen", "rejected")
    ]


def write_scores(scorer, source, output, on_error=None):
    with closing(open_reader(str(source))) as reader, open_output(str(output), suffix="") as out:
        out.begin({}, reader.schema)
        progress = ScoringProgress()
        score_file(scorer, reader, out, returns=("reward",), temperature=1.0, progress=progress, on_error=on_error)


def check(rows, pairs, single):
    chosen, rejected = single
    for row, pair, *sides in zip(rows, pairs, chosen, rejected, strict=True):
        assert {name: row[name] for name in pair} == pair
        for name, score in zip(("chosen", "rejected"), sides, strict=True):
            np.testing.assert_allclose(row[f"values_{name}"], score.values, atol=1e-5)
            np.testing.assert_allclose(row[f"logprobs_{name}"], score.logprobs, atol=1e-5)
            np.testing.assert_allclose(row[f"reward_{name}"], score.reward, atol=1e-5)
        assert np.float32(row["margin"]) == np.float32(row["reward_chosen"]) - np.float32(row["reward_rejected"])
    assert np.abs(chosen.reward - rejected.reward).max() > 1e-2


class TestOutput:
    @FORMATS
    def test_both_sides_are_scored_as_two_runs_would_and_the_margin_is_between_them(
        self, critic, source, pairs, single, tmp_path, suffix
    ):
        output = tmp_path / f"out.{suffix}"
        done = run(source, "-m", critic, "-o", output, "--token-budget", 60, "--chunk-tokens", 100)
        assert done.exit_code == 0, done.stderr
        assert done.stderr.startswith(f"vhead: 12 pairs scored, written to {output}\n")
        rows = rows_of(output)
        assert list(rows[0]) == ["id", "prompt", "chosen", "rejected", *COLUMNS, "margin"]
        check(rows, pairs, single)

    def test_from_parquet(self, critic, pairs, single, tmp_path):
        pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "in.parquet")
        assert run(tmp_path / "in.parquet", "-m", critic, "-o", tmp_path / "out.parquet").exit_code == 0
        check(rows_of(tmp_path / "out.parquet"), pairs, single)

    @FORMATS
    def test_a_suffix_stands_behind_the_side_and_no_reward_means_no_margin(self, critic, source, tmp_path, suffix):
        output = tmp_path / f"out.{suffix}"
        assert run(source, "-m", critic, "-o", output, "--suffix", "_b", "--returns", "values").exit_code == 0
        assert list(rows_of(output)[0])[4:] == ["values_chosen_b", "values_rejected_b"]
        other = tmp_path / f"other.{suffix}"
        assert run(source, "-m", critic, "-o", other, "--suffix", "_b", "--returns", "reward").exit_code == 0
        assert list(rows_of(other)[0])[4:] == ["reward_chosen_b", "reward_rejected_b", "margin_b"]

    @FORMATS
    def test_a_head_of_several_outputs_has_a_margin_of_each(self, source, tmp_path, suffix, critic):
        torch.manual_seed(5)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(critic)
        model.v_head = ValueHead(model.config, num_outputs=3)
        output = tmp_path / f"out.{suffix}"
        write_scores(Scorer(model, ByT5Tokenizer(extra_ids=0)), source, output)
        for row in rows_of(output):
            differences = np.float32(row["reward_chosen"]) - np.float32(row["reward_rejected"])
            np.testing.assert_array_equal(np.float32(row["margin"]), differences)
            assert len(set(row["margin"])) == 3

    @FORMATS
    def test_a_pair_of_which_one_side_lost_tokens_counts_as_truncated_once(self, critic, source, tmp_path, suffix):
        output = tmp_path / f"out.{suffix}"
        done = run(source, "-m", critic, "-o", output, "--truncate", "completion", "--max-length", 40)
        rows = rows_of(output)
        lost = [row["truncated_chosen"] or row["truncated_rejected"] for row in rows]
        assert 0 < sum(lost) < 12
        assert f"12 pairs scored, {sum(lost)} truncated" in done.stderr

    @FORMATS
    def test_no_records_are_an_output_of_rollouts(self, critic, tmp_path, suffix):
        (tmp_path / "in.jsonl").write_text("")
        assert run(tmp_path / "in.jsonl", "-m", critic, "-o", tmp_path / f"out.{suffix}").exit_code == 0


@FORMATS
def test_masks_of_either_side_stand_behind_the_scores_whichever_chunk_has_them(source, tmp_path, suffix):
    output = tmp_path / f"out.{suffix}"
    with closing(open_reader(str(source))) as reader, open_output(str(output), suffix="") as out:
        out.begin({}, reader.schema)
        rows = list(reader)[:3]
        for place, row in enumerate(rows):
            scores = scores_of(3, 3, seed=place)
            scores.mask[[1, 4][place - 1]] = place == 0
            out.write([row], PairScores.of(scores), row)
        out.publish(rows[-1], PairScores.of(scores[:0]))
    found = [[row.get(f"completion_mask_{side}") for side in ("chosen", "rejected")] for row in rows_of(output)]
    assert found == [[None, None], [[True, False, True], None], [None, [True, False, True]]]


class TestBadRecords:
    @FORMATS
    def test_a_pair_with_a_bad_side_is_skipped_whole_and_once(self, critic, source, pairs, single, tmp_path, suffix):
        bad_line(source, 4, json.dumps({"prompt": "a", "chosen": "b" * 300, "rejected": "c" * 300}) + "\n")
        bad_line(source, 9, json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
        output = tmp_path / f"out.{suffix}"
        done = run(source, "-m", critic, "-o", output, "--on-error", "skip")
        assert "10 pairs scored, 2 skipped" in done.stderr
        assert "line 4, chosen: " in done.stderr
        assert "line 9: rejected: expected the field that goes with `chosen`, got nothing" in done.stderr
        kept = [at for at in range(12) if at not in (3, 8)]
        scores = [type(side).concat([side[at : at + 1] for at in kept]) for side in single]
        check(rows_of(output), [pairs[at] for at in kept], scores)

    @FORMATS
    def test_a_side_whose_numbers_are_not_finite_takes_its_pair_along(self, critic, pairs, source, tmp_path, suffix):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(critic)
        bad_line(source, 3, json.dumps(pairs[2] | {"rejected": "~~"}) + "\n")
        bad_line(source, 7, json.dumps(pairs[6] | {"chosen": "~", "rejected": "~"}) + "\n")
        with torch.no_grad():
            model.get_input_embeddings().weight[ord("~") + 3] = torch.nan
        errors, output = [], tmp_path / f"out.{suffix}"
        write_scores(Scorer(model, ByT5Tokenizer(extra_ids=0), batch_invariant=True), source, output, errors.append)
        assert [str(error).split(":")[0] for error in errors] == [
            "line 3 (id 'r2'), rejected",
            "line 7 (id 'r6'), chosen",
        ]
        assert [row["id"] for row in rows_of(output)] == [f"r{at}" for at in range(12) if at not in (2, 6)]

    @pytest.mark.parametrize("first", ["pair", "rollout"])
    def test_a_file_holds_pairs_or_rollouts_and_never_both(self, critic, source, tmp_path, first):
        pair, rollout = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b"}
        records = [pair, rollout] if first == "pair" else [rollout, pair]
        source.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl")
        assert done.exit_code == 1
        forms = ("`chosen` and `rejected`", "one completion")
        expected, got = forms if first == "pair" else forms[::-1]
        assert f"expected {expected}, as the records before it have, got {got}" in done.stderr
        assert len(read_jsonl(tmp_path / "out.jsonl.partial")) == 1

    @FORMATS
    @pytest.mark.parametrize("column", ["margin", "reward_chosen", "values_rejected"])
    def test_a_column_that_the_scores_would_take_is_refused(self, critic, source, pairs, tmp_path, suffix, column):
        bad_line(source, 1, json.dumps(pairs[0] | {column: 1}) + "\n")
        done = run(source, "-m", critic, "-o", tmp_path / f"out.{suffix}")
        assert done.exit_code == 1
        assert f"{column}: expected no such column in the input, because the scores of pairs go there" in done.stderr
        assert run(source, "-m", critic, "-o", tmp_path / f"b.{suffix}", "--suffix", "_b").exit_code == 0

    def test_records_that_are_no_pairs_may_have_such_a_column(self, critic, source, tmp_path):
        source.write_text(json.dumps({"prompt": "a", "completion": "b", "margin": 1, "reward_chosen": 2}) + "\n")
        assert run(source, "-m", critic, "-o", tmp_path / "out.jsonl").exit_code == 0

    def test_advantages_of_pairs_are_refused(self, critic, source, tmp_path):
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--returns", "advantages,returns")
        assert done.exit_code == 1
        assert "expected one completion, because advantages and returns are asked for, got a pair" in done.stderr


class TestResuming:
    @FORMATS
    def test_a_killed_run_is_resumed(self, vhead, critic, source, tmp_path, suffix):
        source.write_text(
            "".join(
                f'{{"id": {at}, "prompt": "Why? ", "chosen": "so be {at % 7}", "rejected": "no {at % 5}"}}\n'
                for at in range(1_200)
            )
        )
        output, notes = tmp_path / f"out.{suffix}", tmp_path / f".out.{suffix}.journal"
        options = ["-m", critic, "-o", output, "--returns", "reward", "--token-budget", "500"]
        process = subprocess.Popen([*vhead, "score", source, *options], stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (notes.exists() and json.loads(notes.read_text())["records"]):
            time.sleep(0.02)
        process.kill()
        process.communicate()
        done = json.loads(notes.read_text())["records"]
        assert 0 < done < 1_200
        resumed = run(source, *options, "--resume")
        assert resumed.exit_code == 0, resumed.stderr
        assert f"{1_200 - done:,} pairs scored" in resumed.stderr
        rows = rows_of(output)
        assert [row["id"] for row in rows] == list(range(1_200))
        for name, period in (("reward_chosen", 7), ("reward_rejected", 5), ("margin", 35)):
            numbers = np.array([row[name] for row in rows])
            np.testing.assert_allclose(numbers[period:], numbers[:-period], atol=1e-5)
            assert np.abs(numbers[1:] - numbers[:-1]).max() > 1e-3

    def test_what_the_file_holds_is_known_from_the_records_that_are_done(self, critic, source, pairs, tmp_path):
        """A run that is resumed at a record of the other form refuses it, as one without a stop would."""
        source.write_text(f"{json.dumps(pairs[0])}\n" + json.dumps({"prompt": "a", "completion": "b"}) + "\n")
        output = tmp_path / "out.jsonl"
        for options in ([], ["--resume"]):
            done = run(source, "-m", critic, "-o", output, *options)
            assert (done.exit_code, "line 2: completion: expected `chosen` and `rejected`" in done.stderr) == (1, True)
        assert len(read_jsonl(tmp_path / "out.jsonl.partial")) == 1
