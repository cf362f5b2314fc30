import functools
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig, AutoModelForTokenClassification, ByT5Tokenizer, modeling_utils

from tests.typer_runner import RUNNER
from vhead import Rollout, Scorer
from vhead.cli.app import app

# Percent of the tokens. Before transformers 4.48 trees are packed under a dense mask, and share less.
SHARED = 71 if hasattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS") else 68
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def run(*arguments, stdin=None):
    return RUNNER.invoke(app, ["score", *map(str, arguments)], input=stdin, env={"COLUMNS": "200"})


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def bad_line(source, number, line):
    lines = source.read_text().splitlines(keepends=True)
    lines[number - 1] = line
    source.write_text("".join(lines))


@pytest.fixture
def scores(critic, records):
    """What the scorer itself gives."""
    rollouts = [Rollout(record["prompt"], record["completion"], record["id"]) for record in records]
    return Scorer.from_pretrained(critic, device="cpu").score(rollouts, ("values", "logprobs", "entropy", "reward"))


class TestOutput:
    def test_jsonl_has_the_records_in_order_with_scores_behind(self, critic, source, records, scores, tmp_path):
        done = run(source, "--model", critic, "--output", tmp_path / "out.jsonl")
        assert (done.exit_code, done.stdout) == (0, "")
        total, rate = done.stderr.splitlines()
        assert total == f"vhead: 12 rollouts scored, written to {tmp_path / 'out.jsonl'}"
        pattern = rf"vhead: 552 tokens in [\d.]+ s, {SHARED}% shared: [\d,]+ rollouts/s, [\d,]+ tokens/s"
        assert re.fullmatch(pattern, rate), rate
        written = read_jsonl(tmp_path / "out.jsonl")
        for record, line, score in zip(records, written, scores, strict=True):
            assert list(line) == ["id", "prompt", "completion", "tag", "values", "logprobs", "reward"]
            assert {name: line[name] for name in record} == record
            np.testing.assert_array_equal(np.float32(line["values"]), score.values)
            np.testing.assert_array_equal(np.float32(line["logprobs"]), score.logprobs)
            assert np.float32(line["reward"]) == np.float32(score.reward)
        assert sorted(os.listdir(tmp_path)) == [".out.jsonl.journal", "in.jsonl", "out.jsonl"]

    def test_parquet_in_and_out(self, critic, source, records, scores, tmp_path):
        first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
        assert run(source, "-m", critic, "-o", first, "--returns", "reward").exit_code == 0
        pq.write_table(pq.read_table(first).drop(["reward"]), first)
        assert run(first, "-m", critic, "-o", second, "--returns", "entropy,values,reward").exit_code == 0
        table = pq.read_table(second)
        assert table.column_names == ["id", "prompt", "completion", "tag", "values", "entropy", "reward"]
        assert table.select(["id", "prompt", "completion", "tag"]).to_pylist() == records
        flat = table.column("entropy").combine_chunks().values.to_numpy()
        np.testing.assert_array_equal(flat, scores.entropy)

    def test_standard_streams(self, critic, source):
        done = run("-", "-m", critic, "-o", "-", "--returns", "reward", stdin=source.read_text())
        assert done.exit_code == 0
        assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [f"r{index}" for index in range(12)]
        assert "written to" not in done.stderr

    def test_temperature(self, critic, source, scores, tmp_path):
        run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--temperature", 2.0)
        written = read_jsonl(tmp_path / "out.jsonl")
        assert not np.allclose(written[0]["logprobs"], scores[0].logprobs)
        np.testing.assert_array_equal(np.float32(written[0]["values"]), scores[0].values)

    def test_options_reach_the_scorer(self, critic, source, tmp_path):
        options = ["--dtype", "bfloat16", "--device", "cpu", "--token-budget", 50, "--num-threads", 1, "--limit", 5]
        assert run(source, "-m", critic, "-o", tmp_path / "out.jsonl", *options).exit_code == 0
        assert len(read_jsonl(tmp_path / "out.jsonl")) == 5

    def test_batch_invariant_scores_do_not_depend_on_the_file(self, critic, source, records, tmp_path):
        options = ["-m", critic, "--batch-invariant", "--returns", "values,logprobs,entropy,reward"]
        assert run(source, "-o", tmp_path / "all.jsonl", *options).exit_code == 0
        source.write_text(json.dumps(records[4]) + "\n")
        assert run(source, "-o", tmp_path / "one.jsonl", *options).exit_code == 0
        assert read_jsonl(tmp_path / "one.jsonl") == read_jsonl(tmp_path / "all.jsonl")[4:5]

    def test_the_head_of_another_folder(self, critic, plain, source, tmp_path):
        done = run(source, "-m", plain, "--head", critic, "-o", tmp_path / "out.jsonl")
        assert done.exit_code == 0, done.stderr
        assert run(source, "-m", critic, "-o", tmp_path / "own.jsonl").exit_code == 0
        assert read_jsonl(tmp_path / "out.jsonl") == read_jsonl(tmp_path / "own.jsonl")

    def test_rewards_without_statistics_are_not_normalised(self, critic, source, tmp_path):
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--normalize-rewards")
        assert done.exit_code == 1
        assert "normalize_rewards needs the mean and std" in done.stderr

    def test_quiet(self, critic, source, tmp_path):
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--quiet")
        assert (done.exit_code, done.output) == (0, "")

    def test_a_random_head_has_to_be_allowed(self, plain, source, tmp_path):
        done = run(source, "-m", plain, "-o", tmp_path / "out.jsonl")
        assert done.exit_code == 1
        assert "expected a trained value head, found none" in done.stderr
        assert run(source, "-m", plain, "-o", tmp_path / "out.jsonl", "--allow-random-head").exit_code == 0


class TestTheClosingLine:
    def test_it_counts_records_of_which_only_tokens_were_asked_for(self, critic, source, tmp_path):
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--returns", "tokens")
        assert done.stderr.splitlines() == [f"vhead: 12 rollouts scored, written to {tmp_path / 'out.jsonl'}"]

    def test_a_record_that_parquet_cannot_hold_counts_as_skipped_alone(self, critic, source, tmp_path):
        bad_line(source, 3, json.dumps({"prompt": "a" * 100, "completion": "b" * 50, "id": 2**70}) + "\n")
        done = run(source, "-m", critic, "-o", tmp_path / "out.parquet", "--on-error", "skip", "--truncate", "prompt")
        assert done.exit_code == 0, done.stderr
        assert f"11 rollouts scored, 1 skipped, written to {tmp_path / 'out.parquet'}" in done.stderr
        assert pq.read_table(tmp_path / "out.parquet").num_rows == 11


class TestTruncation:
    @pytest.fixture
    def long(self, source):
        bad_line(source, 3, json.dumps({"id": "long", "prompt": "a" * 100, "completion": "b" * 50}) + "\n")
        return source

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    @pytest.mark.parametrize(("end", "prompt", "completion"), [("prompt", 78, 50), ("completion", 100, 28)])
    def test_scores_of_what_is_kept_and_a_column_that_says_so(self, request, suffix, end, prompt, completion):
        critic, long, folder = (request.getfixturevalue(name) for name in ("critic", "long", "tmp_path"))
        output = folder / f"out.{suffix}"
        done = run(long, "-m", critic, "-o", output, "--truncate", end)
        assert done.exit_code == 0, done.stderr
        assert "12 rollouts scored, 1 truncated, written to " in done.stderr
        rows = read_jsonl(output) if suffix == "jsonl" else pq.read_table(output).to_pylist()
        assert [row["truncated"] for row in rows] == [row["id"] == "long" for row in rows]
        assert (len(rows[2]["prompt"]), len(rows[2]["completion"])) == (100, 50)
        expected = Scorer.from_pretrained(critic, device="cpu").score([Rollout("a" * prompt, "b" * completion)])
        np.testing.assert_allclose(rows[2]["values"], expected.values, atol=1e-5)

    def test_a_column_of_that_name_is_never_overwritten(self, critic, source, tmp_path):
        bad_line(source, 1, '{"prompt": "a", "completion": "b", "truncated": 1}\n')
        assert run(source, "-m", critic, "-o", tmp_path / "out.jsonl").exit_code == 0
        done = run(source, "-m", critic, "-o", tmp_path / "other.jsonl", "--truncate", "prompt")
        assert done.exit_code == 1
        assert "line 1: truncated: expected no such column in the input" in done.stderr

    def test_a_shorter_limit(self, critic, source, tmp_path):
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--max-length", 20)
        assert done.exit_code == 1
        assert "completion: expected at most 20 tokens together with the prompt, got 20 + " in done.stderr
        options = ["--max-length", 20, "--truncate", "completion"]
        done = run(source, "-m", critic, "-o", tmp_path / "other.jsonl", *options)
        assert "prompt: expected at most 19 tokens" in done.stderr
        done = run(source, "-m", critic, "-o", tmp_path / "third.jsonl", *options, "--on-error", "skip")
        assert "4 rollouts scored, 8 skipped, 3 truncated" in done.stderr

    def test_a_limit_beyond_the_model_s(self, critic, source, tmp_path):
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--max-length", 129)
        assert (done.exit_code, done.stderr) == (
            1,
            "vhead: max_length: expected at most the model's 128 tokens, got 129\n",
        )

    def test_another_rule_is_refused_when_resuming(self, critic, source, tmp_path):
        text = source.read_text()
        bad_line(source, 7, "{broken\n")
        run(source, "-m", critic, "-o", tmp_path / "out.jsonl")
        source.write_text(text)
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--resume", "--truncate", "prompt")
        assert done.exit_code == 1
        assert "truncate: expected None, as in the run that is resumed, got 'prompt'" in done.stderr


class TestBadData:
    def test_a_broken_line_is_named_and_what_came_before_is_kept(self, critic, source, tmp_path):
        bad_line(source, 7, "{broken\n")
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl")
        assert done.exit_code == 1
        assert done.stderr.splitlines() == [
            f"vhead: what has been scored is kept in {tmp_path / 'out.jsonl.partial'}; to continue, mend the record "
            "and give the same command with --resume, or add --on-error skip as well",
            f"vhead: {source}: line 7: text: expected a JSON object, got broken JSON at column 2 "
            "(Expecting property name enclosed in double quotes)",
        ]
        assert [line["id"] for line in read_jsonl(tmp_path / "out.jsonl.partial")] == [
            f"r{index}" for index in range(6)
        ]
        assert not (tmp_path / "out.jsonl").exists()
        skipped = run(
            source, "-m", critic, "-o", tmp_path / "out.jsonl", "--resume", "--on-error", "skip", "--limit", 9
        )
        assert skipped.exit_code == 0
        assert "2 rollouts scored, 1 skipped after the first 6 records, which were done already" in skipped.stderr

    def test_nothing_that_can_be_scored_is_a_failure(self, critic, source, tmp_path):
        source.write_text("{broken\n[]\n")
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--on-error", "skip")
        assert done.exit_code == 1
        assert done.stderr.endswith("no record could be scored, so the output has none\n")
        source.write_text("")
        assert run(source, "-m", critic, "-o", tmp_path / "none.jsonl", "--on-error", "skip").exit_code == 0

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"prompt": "a", "completion": ""}, "completion: expected text, got an empty text"),
            ({"prompt": "a", "completion": "b" * 200}, "completion: expected at most the model's 128 tokens"),
            ({"prompt_ids": [999], "completion_ids": [1]}, "prompt: expected token ids below the vocabulary's 259"),
            ({"prompt": "a", "completion": "b", "values": 1}, "values: expected no such column in the input"),
            ({"messages": CHAT}, "messages: expected a tokenizer with a chat template, got one without"),
        ],
    )
    def test_one_line_names_the_record_and_the_field(self, critic, source, tmp_path, record, message):
        bad_line(source, 3, json.dumps(record) + "\n")
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl")
        assert done.exit_code == 1
        assert done.stderr.splitlines()[-1].startswith(f"vhead: {source}: line 3: {message}")

    def test_unique_ids_are_asked_for_and_both_records_named(self, critic, source, tmp_path):
        bad_line(source, 3, '{"id": "r1", "prompt": "a", "completion": "b"}\n')
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--unique-ids")
        expected = "line 3 (id 'r1'): id: expected an id that no other record has, got the id of line 2 (id 'r1')"
        assert done.stderr.splitlines()[-1] == f"vhead: {source}: {expected}"

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_samples_of_one_prompt_that_carry_its_id_are_all_scored(self, critic, source, records, tmp_path, suffix):
        source.write_text("".join(f"{json.dumps(record | {'id': 'one'})}\n" for record in records))
        done = run(source, "-m", critic, "-o", tmp_path / f"out.{suffix}", "--on-error", "skip")
        assert done.exit_code == 0
        assert "12 rollouts scored, written to" in done.stderr
        output = tmp_path / f"out.{suffix}"
        rows = read_jsonl(output) if suffix == "jsonl" else pq.read_table(output).to_pylist()
        assert [row["id"] for row in rows] == ["one"] * 12

    @pytest.mark.parametrize("ids", [[0.5, 1.5], [True, False], [1, "1"], [[1, [2]], {"a": None}]])
    def test_ids_are_data_and_carried(self, critic, source, tmp_path, ids):
        source.write_text("".join(f'{{"id": {json.dumps(i)}, "prompt": "a", "completion": "b"}}\n' for i in ids))
        assert run(source, "-m", critic, "-o", tmp_path / "out.jsonl").exit_code == 0
        assert [row["id"] for row in read_jsonl(tmp_path / "out.jsonl")] == ids

    def test_true_is_no_token_id(self, critic, source, tmp_path):
        bad_line(source, 3, '{"prompt_ids": [5, true], "completion_ids": [7]}\n')
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl")
        assert "line 3: prompt_ids: expected text or a flat list of integer token ids, got [5, True]" in done.stderr

    def test_bad_records_can_be_skipped(self, critic, source, scores, tmp_path):
        bad_line(source, 1, "[]\n")
        bad_line(source, 7, '{"id": "r6", "prompt_ids": [300], "completion_ids": [1]}\n')
        bad_line(source, 12, '{"id": "r11", "prompt": "a"}')
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--on-error", "skip")
        assert done.exit_code == 0
        assert [line["id"] for line in read_jsonl(tmp_path / "out.jsonl")] == [
            f"r{i}" for i in (1, 2, 3, 4, 5, 7, 8, 9, 10)
        ]
        lines = done.stderr.splitlines()
        assert [line.split(": ")[1:3] for line in lines[:3]] == [
            [f"skipped {source}", "line 1"],
            [f"skipped {source}", "line 7 (id 'r6')"],
            [f"skipped {source}", "line 12 (id 'r11')"],
        ]
        assert "9 rollouts scored, 3 skipped" in lines[-2]
        np.testing.assert_allclose(read_jsonl(tmp_path / "out.jsonl")[5]["values"], scores[7].values, atol=1e-5)

    def test_many_skipped_records_are_counted(self, critic, source, tmp_path):
        source.write_text("broken\n" * 50 + source.read_text())
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--on-error", "skip")
        assert done.stderr.count("vhead: skipped ") == 20
        assert "further skipped records are only counted" in done.stderr
        assert "12 rollouts scored, 50 skipped" in done.stderr

    def test_nothing_is_left_when_nothing_was_scored(self, critic, source, tmp_path):
        bad_line(source, 1, "{broken\n")
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl")
        assert done.exit_code == 1
        assert "kept" not in done.stderr
        assert os.listdir(tmp_path) == ["in.jsonl"]

    def test_an_empty_file(self, critic, source, tmp_path):
        source.write_text("")
        assert run(source, "-m", critic, "-o", tmp_path / "out.jsonl").exit_code == 0
        assert (tmp_path / "out.jsonl").read_text() == ""

    def test_a_file_that_is_no_parquet(self, critic, source, tmp_path):
        source = source.rename(tmp_path / "in.parquet")
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl")
        assert done.exit_code == 1
        assert f"vhead: {source}: not a readable Parquet file" in done.stderr

    def test_a_full_disk(self, critic, source, tmp_path, monkeypatch):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # What a full disk is to the program: writing fails after some bytes. Python ignores the signal.
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        try:
            done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert done.exit_code == 1
        assert done.stderr.splitlines()[-1] == f"vhead: {tmp_path / 'out.jsonl.partial'}: File too large"
        assert run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--resume").exit_code == 0
        assert len(read_jsonl(tmp_path / "out.jsonl")) == 12

    def test_an_input_that_cannot_be_read_is_named(self, critic, tmp_path):
        (tmp_path / "in.jsonl").symlink_to("/proc/self/mem")
        done = run(tmp_path / "in.jsonl", "-m", critic, "-o", tmp_path / "out.jsonl")
        assert done.stderr.splitlines() == [f"vhead: {tmp_path / 'in.jsonl'}: Input/output error"]

    def test_a_column_that_parquet_cannot_hold_is_named_with_its_file(self, critic, tmp_path, monkeypatch):
        def refuse(table):
            raise pa.ArrowNotImplementedError(f"{table.column_names[0]} has no such type")

        pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "in.parquet")
        monkeypatch.setattr("vhead.scoring.files.parquet._try_out", refuse)
        done = run(tmp_path / "in.parquet", "-m", critic, "-o", tmp_path / "out.parquet")
        message = f"{tmp_path / 'in.parquet'}: prompt: expected a column of a type that can be written to Parquet"
        assert message in done.stderr


class TestResume:
    def stop_at(self, critic, source, output, number):
        """Scores up to a broken line, and mends it."""
        text = source.read_text()
        bad_line(source, number, "{broken\n")
        assert run(source, "-m", critic, "-o", output).exit_code == 1
        source.write_text(text)

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_a_mended_input_is_gone_on_with(self, critic, source, scores, tmp_path, suffix):
        output = tmp_path / f"out.{suffix}"
        self.stop_at(critic, source, output, 7)
        done = run(source, "-m", critic, "-o", output, "--resume")
        assert done.exit_code == 0, done.stderr
        assert "6 rollouts scored" in done.stderr
        rows = read_jsonl(output) if suffix == "jsonl" else pq.read_table(output).to_pylist()
        assert [row["id"] for row in rows] == [f"r{index}" for index in range(12)]
        for row, score in zip(rows, scores, strict=True):
            np.testing.assert_allclose(row["values"], score.values, atol=1e-5)

    def test_a_limit_counts_what_is_done(self, critic, source, tmp_path):
        output = tmp_path / "out.jsonl"
        self.stop_at(critic, source, output, 7)
        assert run(source, "-m", critic, "-o", output, "--resume", "--limit", 8).exit_code == 0
        assert [row["id"] for row in read_jsonl(output)] == [f"r{index}" for index in range(8)]

    def test_without_an_earlier_run_it_starts(self, critic, source, tmp_path):
        assert run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--resume").exit_code == 0
        assert len(read_jsonl(tmp_path / "out.jsonl")) == 12

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda lines: ["{}\n", *lines],
                "in.jsonl: expected the 6 records that the earlier run finished, got others up to line 6",
            ),
            (lambda lines: [*lines[1::-1], *lines[2:]], "got others up to line 6"),
            (lambda lines: [lines[0].replace("r0", "r9"), *lines[1:]], "got others up to line 6"),
            (lambda lines: lines[:3], "in.jsonl: expected the 6 records that the earlier run finished, got 3"),
            (lambda lines: [], "in.jsonl: expected the 6 records that the earlier run finished, got 0"),
        ],
    )
    def test_another_input_is_refused(self, critic, source, tmp_path, change, message):
        self.stop_at(critic, source, tmp_path / "out.jsonl", 7)
        source.write_text("".join(change(source.read_text().splitlines(keepends=True))))
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--resume")
        assert done.exit_code == 1
        assert message in done.stderr
        assert len(read_jsonl(tmp_path / "out.jsonl.partial")) == 6

    def test_other_settings_are_refused(self, critic, source, tmp_path):
        self.stop_at(critic, source, tmp_path / "out.jsonl", 7)
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--resume", "--temperature", "0.5")
        assert done.exit_code == 1
        assert "temperature: expected 1.0, as in the run that is resumed, got 0.5" in done.stderr

    def test_an_earlier_run_is_not_lost_unasked(self, critic, source, tmp_path):
        self.stop_at(critic, source, tmp_path / "out.jsonl", 7)
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl")
        assert done.exit_code == 1
        expected = (
            "an earlier run stopped before it was finished; continue it with --resume, or start anew with --overwrite"
        )
        assert expected in done.stderr
        assert len(read_jsonl(tmp_path / "out.jsonl.partial")) == 6

    def test_a_stream_cannot_be_resumed(self, critic, source):
        done = run(source, "-m", critic, "-o", "-", "--resume")
        assert done.exit_code == 2


class TestSameRun:
    """What --resume goes on with: the same records, model and options, and nothing else."""

    @pytest.fixture
    def stopped(self, critic, source, tmp_path):
        """An output of which six records are done, and its mended input."""
        text = source.read_text()
        bad_line(source, 7, "{broken\n")
        assert run(source, "-m", critic, "-o", tmp_path / "out.jsonl").exit_code == 1
        source.write_text(text)
        return tmp_path / "out.jsonl"

    def test_weights_of_the_same_size_and_time_are_noticed(self, critic, source, stopped, tmp_path):
        copy = tmp_path / "critic"
        shutil.copytree(critic, copy)
        assert run(source, "-m", copy, "-o", stopped, "--resume", "--limit", 7).exit_code == 0
        stopped.unlink()
        weights = copy / "model.safetensors"
        before, content = weights.stat(), bytearray(weights.read_bytes())
        content[-2] ^= 1
        weights.write_bytes(content)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        bad_line(source, 7, "{broken\n")
        assert run(source, "-m", critic, "-o", stopped).exit_code == 1
        done = run(source, "-m", copy, "-o", stopped, "--resume")
        assert done.exit_code == 1
        assert "model file model.safetensors: expected '" in done.stderr

    @pytest.mark.parametrize(
        ("option", "name"),
        [
            (["--token-budget", "50"], "token_budget: expected None"),
            (["--chunk-tokens", "50"], "chunk_tokens: expected None"),
            (["--num-threads", "1"], "num_threads: expected None"),
            (["--batch-invariant"], "batch_invariant: expected False"),
            (["--suffix", "_b"], "suffix: expected ''"),
            (["--device", "cpu"], "device: expected None"),
            (["--unique-ids"], "unique_ids: expected False"),
        ],
    )
    def test_other_options_are_refused(self, critic, source, stopped, option, name):
        done = run(source, "-m", critic, "-o", stopped, "--resume", *option)
        assert done.exit_code == 1
        assert f"{name}, as in the run that is resumed, got " in done.stderr

    def test_a_stream_s_run_does_not_touch_what_another_left(self, critic, source, stopped):
        part = stopped.with_name("out.jsonl.partial").read_bytes()
        other = '{"prompt": "Other ", "completion": "text"}\n'
        done = run("-", "-m", critic, "-o", stopped, stdin=other)
        assert done.exit_code == 1
        assert (
            "stopped before it was finished; continue it with --resume, or start anew with --overwrite" in done.stderr
        )
        assert stopped.with_name("out.jsonl.partial").read_bytes() == part
        assert run("-", "-m", critic, "-o", stopped, "--overwrite", stdin=other + "{broken").exit_code == 1
        done = run(source, "-m", critic, "-o", stopped, "--resume")
        assert done.exit_code == 1
        assert "overwrite: expected True" in done.stderr
        done = run(source, "-m", critic, "-o", stopped, "--resume", "--overwrite")
        assert "in.jsonl: expected the 1 records that the earlier run finished, got others up to line 1" in done.stderr

    def test_standard_input_is_gone_on_with_like_a_file(self, critic, source, stopped, tmp_path):
        text = source.read_text()
        done = run("-", "-m", critic, "-o", stopped, "--resume", stdin=text)
        assert done.exit_code == 0, done.stderr
        assert "6 rollouts scored" in done.stderr
        assert run(source, "-m", critic, "-o", tmp_path / "whole.jsonl").exit_code == 0
        assert [row["id"] for row in read_jsonl(stopped)] == [f"r{index}" for index in range(12)]

    def test_an_id_that_was_seen_before_the_stop_is_seen_after_it(self, critic, source, tmp_path):
        text = source.read_text()
        bad_line(source, 7, "{broken\n")
        run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--unique-ids")
        source.write_text(text.replace('"r8"', '"r2"'))
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--unique-ids", "--resume")
        assert done.exit_code == 1
        assert (
            "line 9 (id 'r2'): id: expected an id that no other record has, got the id of line 3 (id 'r2')"
            in done.stderr
        )


class TestFinished:
    @pytest.fixture(params=["jsonl", "parquet"])
    def output(self, request, critic, source, tmp_path):
        output = tmp_path / f"out.{request.param}"
        assert run(source, "-m", critic, "-o", output).exit_code == 0
        return output

    def test_the_same_run_says_that_it_is_finished(self, critic, source, output):
        before = output.stat().st_mtime_ns
        done = run(source, "-m", critic, "-o", output, "--resume")
        assert (done.exit_code, done.stderr) == (
            0,
            f"vhead: {output} is finished already with 12 records, so nothing was scored\n",
        )
        assert output.stat().st_mtime_ns == before

    def test_without_options_it_is_refused_before_the_model_is_read(self, source, output):
        done = run(source, "-m", "unused", "-o", output)
        expected = f"vhead: {output}: expected no such file yet; replace it with --overwrite, or choose another name\n"
        assert (done.exit_code, done.stderr) == (1, expected)

    def test_another_input_is_not_finished(self, critic, source, output):
        with source.open("a") as file:
            file.write('{"prompt": "One ", "completion": "more"}\n')
        done = run(source, "-m", critic, "-o", output, "--resume")
        assert done.exit_code == 1
        expected = "expected an input of the 12 records that are finished, got more: line 13; to score them too, "
        assert f"{expected}start anew with --overwrite and without --resume" in done.stderr

    def test_a_limit_below_what_is_finished_is_named_and_not_the_input(self, critic, source, output):
        done = run(source, "-m", critic, "-o", output, "--resume", "--limit", 2)
        assert done.exit_code == 1
        assert "limit: expected at least the 12 records that are done, got 2" in done.stderr
        assert "input" not in done.stderr

    def test_it_is_overwritten_when_asked(self, critic, source, output):
        assert run(source, "-m", critic, "-o", output, "--overwrite", "--limit", 3).exit_code == 0
        rows = read_jsonl(output) if output.suffix == ".jsonl" else pq.read_table(output).to_pylist()
        assert len(rows) == 3

    @pytest.mark.parametrize(
        ("options", "added", "gone"),
        [
            (["--suffix", "_b", "--returns", "reward"], ["reward_b"], []),
            (["--overwrite", "--returns", "reward"], ["reward"], ["reward"]),
        ],
    )
    def test_a_scored_input_is_scored_again(self, critic, output, options, added, gone):
        again = output.with_name(f"again{output.suffix}")
        done = run(output, "-m", critic, "-o", again, "--returns", "reward")
        assert done.exit_code == 1
        expected = "reward: expected no such column in the input, because the scores go there, got one; "
        assert f"{expected}give the new columns other names with --suffix" in done.stderr
        done = run(output, "-m", critic, "-o", again, *options)
        assert done.exit_code == 0
        assert ("their content is not in the output: `reward`" in done.stderr) == bool(gone)
        rows = [
            read_jsonl(path) if path.suffix == ".jsonl" else pq.read_table(path).to_pylist() for path in (output, again)
        ]
        names = ["id", "prompt", "completion", "tag", "values", "logprobs", "reward"]
        assert list(rows[1][0]) == [*(name for name in names if name not in gone), *added]
        for first, second in zip(*rows, strict=True):
            assert second[added[0]] == pytest.approx(first["reward"], abs=1e-5)
            assert second["values"] == first["values"]


class TestOddRecords:
    """Under --on-error skip no record ends the run, whether it cannot be read or cannot be written."""

    ODD = (
        r'{"prompt": "a\ud800", "completion": "b"}',
        r'{"messages": [{"role": "user", "content": "\udc00"}, {"role": "assistant", "content": "b"}]}',
        f'{{"id": {"[" * 970}{"]" * 970}, "prompt": "a", "completion": ""}}',
        json.dumps({"prompt": "a", "completion": "b", "tag": functools.reduce(lambda x, _: {"x": x}, range(500))}),
        '{"prompt": "a", "completion": "b", "tag": "text"}',
        '{"prompt": "a", "completion": "b", "tag": [18446744073709551616]}',
        '{"prompt": "a", "completion": "b", "tag": ["\\ud800"]}',
    )

    def test_they_are_named_and_the_others_scored(self, critic, source, tmp_path):
        good = source.read_text().splitlines()
        source.write_text("\n".join([*good[:6], *self.ODD, *good[6:]]) + "\n")
        done = run(source, "-m", critic, "-o", tmp_path / "out.parquet", "--on-error", "skip", "--chunk-tokens", 16)
        assert done.exit_code == 0, done.stderr
        assert "12 rollouts scored" not in done.stderr.splitlines()[0]
        named = [line.split(": ")[2] for line in done.stderr.splitlines() if line.startswith("vhead: skipped")]
        assert sorted(named, key=lambda name: int(name.split()[1])) == [f"line {number}" for number in range(7, 14)]
        table = pq.read_table(tmp_path / "out.parquet")
        assert table.column("id").to_pylist() == [f"r{index}" for index in range(12)]
        assert table.column("tag").to_pylist() == [[index] for index in range(12)]

    def test_the_old_name_of_the_chunk_s_tokens_works_and_says_the_new_one(self, critic, source, tmp_path):
        outputs = [tmp_path / "old.jsonl", tmp_path / "new.jsonl"]
        old, new = (
            run(source, "-m", critic, "-o", output, option, 16)
            for option, output in zip(("--window-tokens", "--chunk-tokens"), outputs, strict=True)
        )
        assert (old.exit_code, new.exit_code) == (0, 0), old.stderr + new.stderr
        assert "--window-tokens is now called --chunk-tokens" in old.stderr
        assert "--window-tokens" not in new.stderr
        assert outputs[0].read_bytes() == outputs[1].read_bytes()

    def test_an_empty_input_gives_the_columns(self, critic, source, tmp_path):
        source.write_text("")
        assert run(source, "-m", critic, "-o", tmp_path / "out.parquet", "--suffix", "_b").exit_code == 0
        assert pq.read_schema(tmp_path / "out.parquet").names == ["values_b", "logprobs_b", "reward_b"]

    @pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
    def test_an_output_that_cannot_be_is_found_before_the_model_is_read(self, source, tmp_path, kind):
        output = tmp_path / "out.jsonl"
        {"folder": output.mkdir, "pipe": lambda: os.mkfifo(output), "link": lambda: output.symlink_to(source)}[kind]()
        done = run(source, "-m", "unused", "-o", output, "--overwrite")
        assert done.exit_code in (1, 2)
        assert f"found a {kind}" in done.stderr or "is the input" in " ".join(done.stderr.replace("│", " ").split())
        assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["--returns", "values,kl"],
                "prompt_value, bootstrap, steps, tokens, advantages, returns, got 'values', 'kl'",
            ),
            (["--returns", ","], "got none"),
            (["--temperature", "0"], "expected a positive number"),
            (["--temperature", "nan"], "expected a positive number"),
            (
                ["--output", "out.csv"],
                "expected a name that ends in .jsonl or .jsonl.gz or .jsonl.zst or .parquet, or `-`, got '.csv'",
            ),
            (["--output", "nowhere/out.jsonl"], "no such folder"),
            (["--on-error", "ignore"], "'ignore' is not one of"),
            (["--dtype", "int8"], "'int8' is not one of"),
            (["--token-budget", "0"], "'--token-budget'"),
            (["--limit", "0"], "'--limit'"),
            (["--max-length", "1"], "'--max-length'"),
            (["--truncate", "left"], "'left' is not one of"),
            (["--unknown"], "No such option"),
        ],
    )
    def test_wrong_arguments(self, source, tmp_path, arguments, message):
        done = run(source, "--model", "unused", "--output", tmp_path / "out.jsonl", *arguments)
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.replace("│", " ").split())

    @pytest.mark.parametrize(("name", "message"), [("missing.jsonl", "no such file"), ("in.csv", "expected a name")])
    def test_wrong_input(self, tmp_path, name, message):
        done = run(tmp_path / name, "--model", "unused", "--output", tmp_path / "out.jsonl")
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.replace("│", " ").split())

    def test_an_input_that_is_there_and_no_file_is_called_that(self, tmp_path):
        pipe, loop = tmp_path / "pipe.jsonl", tmp_path / "loop.jsonl"
        os.mkfifo(pipe)
        loop.symlink_to(loop)
        for name, message in ((pipe, "found a pipe, a device or a folder"), (loop, "Too many levels of symbolic")):
            done = run(name, "--model", "unused", "--output", tmp_path / "out.jsonl")
            assert done.exit_code == 2
            told = " ".join(done.stderr.replace("│", " ").split())
            assert message in told
            assert "no such file" not in told

    def test_the_input_is_never_overwritten(self, source):
        done = run(source, "--model", "unused", "--output", source.parent / ".." / source.parent.name / source.name)
        assert done.exit_code == 2
        assert "is the input" in done.stderr

    def test_no_such_model(self, source, tmp_path):
        done = run(source, "--model", tmp_path / "nothing", "--output", tmp_path / "out.jsonl")
        assert done.exit_code == 1
        expected = "expected the folder of a model or a repository on the hub, but there is no such folder"
        assert done.stderr == f"vhead: {tmp_path / 'nothing'}: {expected}\n"


class TestProcess:
    @pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
    def test_interrupt_keeps_what_was_scored(self, vhead, critic, source, tmp_path, sent):
        source.write_text(
            "".join(f'{{"id": {i}, "prompt": "Why? ", "completion": "so be it"}}\n' for i in range(300_000))
        )
        command = [*vhead, "score", source, "-m", critic, "-o", tmp_path / "out.jsonl"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        partial = tmp_path / "out.jsonl.partial"
        journal = tmp_path / ".out.jsonl.journal"
        # A part in which no record is done yet does not stay.
        while process.poll() is None and not (journal.exists() and re.search('"records": [1-9]', journal.read_text())):
            time.sleep(0.05)
        process.send_signal(sent)
        _, stderr = process.communicate()
        assert process.returncode == 128 + sent
        kept = read_jsonl(partial)
        assert [line["id"] for line in kept] == list(range(len(kept)))
        assert 0 < len(kept) < 300_000
        kept_in = f"what has been scored is kept in {partial}; give the same command again with --resume to continue"
        assert stderr == f"vhead: {kept_in}\nvhead: interrupted\n"
        assert not (tmp_path / "out.jsonl").exists()

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_a_killed_run_is_resumed(self, vhead, critic, source, tmp_path, suffix):
        source.write_text(
            "".join(f'{{"id": {i}, "prompt": "Why? ", "completion": "so be {i % 7}"}}\n' for i in range(20_000))
        )
        output = tmp_path / f"out.{suffix}"
        command = [*vhead, "score", source, "-m", critic, "-o", output, "--returns", "reward", "--token-budget", "500"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        notes = tmp_path / f".out.{suffix}.journal"
        while process.poll() is None and not (notes.exists() and json.loads(notes.read_text())["records"]):
            time.sleep(0.02)
        process.kill()
        process.communicate()
        done = json.loads(notes.read_text())["records"]
        assert 0 < done < 20_000
        resumed = run(source, "-m", critic, "-o", output, "--returns", "reward", "--token-budget", "500", "--resume")
        assert resumed.exit_code == 0, resumed.stderr
        assert f"{20_000 - done:,} rollouts scored" in resumed.stderr
        rows = read_jsonl(output) if suffix == "jsonl" else pq.read_table(output).to_pylist()
        assert [row["id"] for row in rows] == list(range(20_000))
        rewards = np.array([row["reward"] for row in rows])
        np.testing.assert_allclose(rewards[7:], rewards[:-7], atol=1e-5)
        assert np.abs(rewards[1:] - rewards[:-1]).max() > 1e-3
        assert sorted(os.listdir(tmp_path)) == [notes.name, "in.jsonl", output.name]

    def test_progress_on_a_terminal_only_and_data_on_standard_output(self, vhead, critic, source):
        source.write_text(source.read_text().replace('"id": "r', '"key": "r') * 100)
        ours, theirs = pty.openpty()
        command = [*vhead, "score", source, "-m", critic, "-o", "-", "--token-budget", "300"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"})
        os.close(theirs)
        shown = b""
        lines = []
        os.set_blocking(process.stdout.fileno(), False)
        while True:
            lines += (process.stdout.read() or b"",)
            try:
                shown += os.read(ours, 4096)
            except OSError:  # The other end is closed.
                break
        os.close(ours)
        lines += (process.stdout.read() or b"",)
        process.stdout.close()
        assert process.wait() == 0
        assert len([json.loads(line) for line in b"".join(lines).splitlines()]) == 1200
        for word in (b"loading", b"rollouts", b"tokens/s", b"left", b"1,200 rollouts scored"):
            assert word in shown

    def test_a_reader_that_goes_away(self, vhead, critic, source):
        command = [*vhead, "score", source, "-m", critic, "-o", "-", "--quiet"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.close()
            assert process.stderr.read() == "vhead: standard output: Broken pipe\n"
        assert process.returncode == 1


class TestReturns:
    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_tokens_line_values_up_with_the_text(self, critic, source, records, tmp_path, suffix):
        output = tmp_path / f"out{suffix}"
        done = run(source, "-m", critic, "-o", output, "--returns", "tokens,values")
        assert done.exit_code == 0, done.stderr
        scored = read_jsonl(output) if suffix == ".jsonl" else pq.read_table(output).to_pylist()
        for record, line in zip(records, scored, strict=True):
            text = record["completion"]
            assert line["token_ids"] == [byte + 3 for byte in text.encode()]
            assert [text[first:stop] for first, stop in line["token_offsets"]] == list(text)
            assert len(line["values"]) == len(text)

    def test_a_classifier_gives_what_it_can_and_says_so(self, critic, source, tmp_path):
        folder = tmp_path / "classifier"
        config = AutoConfig.from_pretrained(critic)
        config.num_labels = 1
        AutoModelForTokenClassification.from_config(config).save_pretrained(folder)
        ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
        done = run(source, "-m", folder, "-o", tmp_path / "out.jsonl")
        assert done.exit_code == 0, done.stderr
        assert {"values", "reward"} == read_jsonl(tmp_path / "out.jsonl")[0].keys() - {
            "id",
            "prompt",
            "completion",
            "tag",
        }

    @pytest.mark.parametrize("option", ["--append-eos", "--separate-tokens"])
    def test_options_for_text(self, critic, source, tmp_path, option):
        done = run(source, "-m", critic, "-o", tmp_path / "out.jsonl", "--returns", "tokens", option)
        assert done.exit_code == 0, done.stderr
        ended = read_jsonl(tmp_path / "out.jsonl")[0]["token_ids"][-1] == 1
        assert ended == (option == "--append-eos")
