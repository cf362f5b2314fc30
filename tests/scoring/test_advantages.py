"""Advantages and returns of scores, in Python and in files."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.scoring.scoring_models import VOCABULARY, critic
from tests.scoring.test_masks import traces
from tests.typer_runner import RUNNER
from vhead import AutoModelForCausalLMWithValueHead, Scorer, ValueHead
from vhead.cli.app import app
from vhead.errors import MissingFieldError, VheadError


def slow_gae(reward, values, mask, gamma, lam, value_lam):
    """The plainest loop: the tokens that the model wrote, one after the other from the end, in float64."""
    advantages, returns = np.zeros(len(values)), np.zeros(len(values))
    places = np.flatnonzero(mask)
    for out, own_lam in ((advantages, lam), (returns, value_lam)):
        running, following = 0.0, 0.0
        for at in places[::-1]:
            earned = reward if at == places[-1] else 0.0
            running = earned + gamma * following - float(values[at]) + gamma * own_lam * running
            following = float(values[at])
            out[at] = running
    returns[places] += values[places]
    return advantages, returns


@pytest.fixture(scope="module")
def model():
    return critic()


@pytest.fixture(scope="module")
def scores(model):
    return Scorer(model).score(traces(9, seed=3), ["values", "logprobs", "reward", "bootstrap"])


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("critic")
    model.save_pretrained(path)
    return path


class TestInPython:
    def test_they_equal_a_slow_loop_over_the_model_s_tokens(self, scores):
        rewards = np.random.default_rng(1).normal(size=len(scores)).astype(np.float32)
        advantages, returns = scores.advantages(rewards, gamma=0.98, lam=0.9, value_lam=1.0)
        for place, score in enumerate(scores):
            own = slice(*scores.offsets[place : place + 2])
            expected = slow_gae(rewards[place], score.values, score.mask, 0.98, 0.9, 1.0)
            np.testing.assert_allclose(advantages[own], expected[0], atol=1e-6)
            np.testing.assert_allclose(returns[own], expected[1], atol=1e-6)

    def test_the_head_s_own_reward_is_the_default(self, scores):
        np.testing.assert_array_equal(scores.advantages()[0], scores.advantages(scores.reward)[0])
        assert not np.array_equal(scores.advantages()[0], scores.advantages(scores.reward + 1)[0])

    def test_rewards_of_tokens_are_taken_as_they_are(self, scores):
        rewards = np.random.default_rng(2).normal(size=scores.token_count).astype(np.float32)
        advantages, _ = scores.advantages(rewards, gamma=0.0)
        np.testing.assert_allclose(advantages[scores.mask], (rewards - scores.values)[scores.mask], atol=1e-6)

    def test_a_divergence_costs_reward_at_the_model_s_tokens(self, scores):
        reference = scores.logprobs + 0.5
        plain, _ = scores.advantages(gamma=0.0)
        penalised, _ = scores.advantages(gamma=0.0, ref_logprobs=reference, kl_coef=0.1)
        np.testing.assert_allclose(penalised[scores.mask] - plain[scores.mask], 0.05, atol=1e-5)

    def test_a_rollout_that_was_cut_off_goes_on_with_its_bootstrap(self, scores):
        plain, _ = scores.advantages(gamma=0.9, lam=0.0)
        cut, _ = scores.advantages(gamma=0.9, lam=0.0, bootstrap=scores.bootstrap)
        last = [start + np.flatnonzero(s.mask)[-1] for start, s in zip(scores.offsets, scores, strict=False)]
        np.testing.assert_allclose((cut - plain)[last], 0.9 * scores.bootstrap, atol=1e-5)

    def test_only_those_that_were_cut_off_go_on(self, scores):
        cut_off = np.arange(len(scores)) % 3 == 1
        found = scores.advantages(gamma=0.9, lam=0.8, cut_off=cut_off)
        plain = scores.advantages(gamma=0.9, lam=0.8)
        going_on = scores.advantages(gamma=0.9, lam=0.8, bootstrap=scores.bootstrap)
        for place, cut in enumerate(cut_off):
            own = slice(*scores.offsets[place : place + 2])
            for numbers, expected, other in zip(found, *((going_on, plain) if cut else (plain, going_on)), strict=True):
                np.testing.assert_array_equal(numbers[own], expected[own])
                assert not np.array_equal(numbers[own], other[own])

    @pytest.mark.parametrize("cut_off", [[True] * 8, [0.0] * 9, [1] * 9, True, "yes"], ids=str)
    def test_what_does_not_say_which_were_cut_off_is_refused(self, scores, cut_off):
        with pytest.raises(ValueError, match="cut_off: expected a bool for each of 9 rollouts, got "):
            scores.advantages(cut_off=cut_off)

    def test_cut_off_and_bootstrap_together_are_refused(self, scores):
        with pytest.raises(ValueError, match="cut_off: expected None beside bootstrap"):
            scores.advantages(cut_off=[True] * 9, bootstrap=scores.bootstrap)

    def test_cut_off_without_bootstrap_values_is_named(self, model):
        scores = Scorer(model).score(traces(2), ["values", "reward"])
        with pytest.raises(MissingFieldError, match="bootstrap"):
            scores.advantages(cut_off=[True, False])

    def test_rewards_of_another_length_are_refused(self, scores):
        with pytest.raises(ValueError, match=r"reward: expected one number for each .*, got shape \[8\]"):
            scores.advantages(scores.reward[:8])

    @pytest.mark.parametrize("rewards", [["a"] * 9, [1j] * 9, [[1.0], [2.0, 3.0]]], ids=str)
    def test_rewards_that_are_no_numbers_are_named(self, scores, rewards):
        with pytest.raises(TypeError, match="reward: expected numbers, got: "):
            scores.advantages(rewards)

    def test_a_reward_beyond_float32_is_named(self, scores):
        with pytest.raises(ValueError, match="reward: expected finite numbers, got inf at rollout 8"):
            scores.advantages([0.5] * 8 + [1e300])

    def test_what_was_not_scored_is_named(self, model):
        scores = Scorer(model).score(traces(2), ["values"])
        with pytest.raises(MissingFieldError, match="reward"):
            scores.advantages()

    def test_a_head_with_several_outputs_is_refused(self, model):
        wide = AutoModelForCausalLMWithValueHead(model.pretrained_model)
        wide.v_head = ValueHead(model.pretrained_model.config, num_outputs=2)
        scores = Scorer(wide.eval()).score(traces(2), ["values", "reward"])
        with pytest.raises(VheadError, match="advantages: expected a head with one output, got 2"):
            scores.advantages([1.0, 2.0])


class TestInFiles:
    @pytest.fixture
    def source(self, tmp_path):
        rng = np.random.default_rng(5)
        records = [
            {
                "id": record.id,
                "prompt_ids": record.prompt.tolist(),
                "completion_ids": record.completion.tolist(),
                "completion_mask": record.mask.tolist(),
                "earned": float(rng.normal()),
            }
            for record in traces(6, seed=4)
        ]
        path = tmp_path / "in.jsonl"
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return path, records

    def run(self, *arguments):
        return RUNNER.invoke(app, ["score", *map(str, arguments)], env={"COLUMNS": "200"})

    @pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
    def test_a_file_of_masked_rollouts_becomes_advantages_in_one_command(self, folder, source, tmp_path, name):
        path, records = source
        options = ("--returns", "values,advantages,returns", "--gamma", "0.97", "--lam", "0.9", "--value-lam", "1")
        done = self.run(path, "-m", folder, "-o", tmp_path / name, *options, "--reward-field", "earned")
        assert done.exit_code == 0, done.stderr
        if name.endswith("jsonl"):
            written = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        else:
            written = pq.read_table(tmp_path / name).to_pylist()
        for record, line in zip(records, written, strict=True):
            assert {key: line[key] for key in record} == record
            assert "reward" not in line
            values, mask = np.float32(line["values"]), np.array(record["completion_mask"])
            advantages, returns = slow_gae(np.float32(record["earned"]), values, mask, 0.97, 0.9, 1.0)
            np.testing.assert_allclose(line["advantages"], advantages, atol=1e-6)
            np.testing.assert_allclose(line["returns"], returns, atol=1e-6)

    def test_a_record_without_a_reward_is_named_and_the_others_are_written(self, folder, source, tmp_path):
        path, records = source
        records[2]["earned"] = None
        records[4]["earned"] = float("nan")
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        options = ("-m", folder, "--returns", "advantages", "--reward-field", "earned")
        failed = self.run(path, "-o", tmp_path / "a.jsonl", *options)
        assert failed.exit_code == 1
        expected = "a finite number that float32 can hold, which is the reward"
        assert f"line 3 (id 'r2'): earned: expected {expected}, got nothing" in failed.stderr
        assert f"in a record with {', '.join(records[2])}" in failed.stderr
        done = self.run(path, "-o", tmp_path / "b.jsonl", *options, "--on-error", "skip")
        assert done.exit_code == 0
        assert "2 skipped" in done.stderr
        written = [json.loads(line)["id"] for line in (tmp_path / "b.jsonl").read_text().splitlines()]
        assert written == ["r0", "r1", "r3", "r5"]

    @pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
    def test_a_reward_beyond_float32_costs_its_own_record_alone(self, folder, source, tmp_path, ending):
        path, records = source
        records[2]["earned"], records[3]["earned"] = 1e300, 3e38
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        options = ("--returns", "advantages", "--reward-field", "earned", "--on-error", "skip")
        done = self.run(path, "-m", folder, "-o", tmp_path / f"out{ending}", *options)
        assert done.exit_code == 0, done.stderr
        assert "line 3 (id 'r2'): earned: expected a finite number that float32 can hold" in done.stderr
        assert "5 rollouts scored, 1 skipped" in done.stderr

    @pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
    def test_a_file_in_which_nobody_gave_candidates_has_no_records_left(self, folder, source, tmp_path, ending):
        out = tmp_path / f"out{ending}"
        done = self.run(source[0], "-m", folder, "-o", out, "--returns", "candidates", "--on-error", "skip")
        assert done.exit_code == 1, "nothing could be scored"
        assert "0 rollouts scored, 6 skipped" in done.stderr
        assert (pq.read_table(out).num_rows if ending == ".parquet" else len(out.read_text())) == 0

    def test_nothing_is_scored_before_a_missing_reward_is_found(self, folder, source, tmp_path, monkeypatch):
        path, records = source
        records[2]["earned"] = None
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        scored = []
        original = Scorer._underway

        def noting(scorer, chunk, *rest):
            scored.append(len(chunk.rollouts))
            return original(scorer, chunk, *rest)

        monkeypatch.setattr(Scorer, "_underway", noting)
        options = ("--returns", "advantages", "--reward-field", "earned", "--on-error", "skip")
        assert self.run(path, "-m", folder, "-o", tmp_path / "a.jsonl", *options).exit_code == 0
        assert sum(scored) == 5, "the record without a reward is not computed"

    @pytest.mark.parametrize(
        ("name", "endings"),
        [
            ("out.jsonl", [True, False, "length", "stop", "tool_calls", "eos"]),
            ("out.parquet", ["length", "stop", "length", "stop", "tool_calls", "function_call"]),
        ],
        ids=["JSON Lines", "Parquet"],
    )
    def test_records_say_which_of_them_were_cut_off(self, folder, source, tmp_path, name, endings):
        path, records = source
        for record, ended in zip(records, endings, strict=True):
            record["ended"] = ended
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        options = ("-m", folder, "--reward-field", "earned", "--gamma", "0.9", "--cut-off-field", "ended")
        done = self.run(path, "-o", tmp_path / name, "--returns", "values,bootstrap,advantages", *options)
        assert done.exit_code == 0, done.stderr
        if name.endswith("jsonl"):
            written = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        else:
            written = pq.read_table(tmp_path / name).to_pylist()
        for place, (record, line) in enumerate(zip(records, written, strict=True)):
            values, mask = np.float32(line["values"]), np.array(record["completion_mask"])
            last = np.flatnonzero(mask)[-1]
            behind = line["bootstrap"] if place in (0, 2) else 0.0
            expected = np.float32(record["earned"]) + 0.9 * behind - values[last]
            np.testing.assert_allclose(line["advantages"][last], expected, atol=1e-5)

    def test_bootstrap_is_written_only_where_it_is_asked_for(self, folder, source, tmp_path):
        path, records = source
        path.write_text("".join(f"{json.dumps(record | {'ended': True})}\n" for record in records))
        options = ("-m", folder, "--returns", "advantages", "--cut-off-field", "ended")
        assert self.run(path, "-o", tmp_path / "b.jsonl", *options).exit_code == 0
        assert "bootstrap" not in json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])

    @pytest.mark.parametrize(
        ("ended", "got"), [(None, "nothing"), ("abort", "'abort'"), (1, "1"), ([True], r"\[True\]")], ids=str
    )
    def test_a_record_that_does_not_say_whether_it_was_cut_off_is_named(self, folder, source, tmp_path, ended, got):
        path, records = source
        for place, record in enumerate(records):
            record["ended"] = ended if place == 3 else False
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        options = ("-m", folder, "--returns", "advantages", "--cut-off-field", "ended")
        failed = self.run(path, "-o", tmp_path / "a.jsonl", *options)
        assert failed.exit_code == 1
        expected = r"line 4 \(id 'r3'\): ended: expected true or false, or one of the finish reasons length, stop, .*"
        assert re.search(f"{expected}, got {got}", failed.stderr)

    @pytest.mark.parametrize("arguments", [("--gamma", "1.5"), ("--lam", "-0.1"), ("--value-lam", "2")])
    def test_numbers_outside_their_range_are_wrong_usage(self, folder, source, tmp_path, arguments):
        done = self.run(source[0], "-m", folder, "-o", tmp_path / "a.jsonl", "--returns", "advantages", *arguments)
        assert done.exit_code == 2

    @pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
    def test_everything_at_once_has_its_columns(self, folder, source, tmp_path, name):
        path, records = source
        rng = np.random.default_rng(7)
        for record in records:
            record["candidates"] = rng.integers(0, VOCABULARY, (len(record["completion_ids"]), 3)).tolist()
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        returns = "values,logprobs,entropy,candidates,reward,prompt_value,bootstrap,steps,tokens,advantages,returns"
        done = self.run(path, "-m", folder, "-o", tmp_path / name, "--returns", returns, "--top-logprobs", "2")
        assert done.exit_code == 0, done.stderr
        if name.endswith("jsonl"):
            line = json.loads((tmp_path / name).read_text().splitlines()[0])
        else:
            line = pq.read_table(tmp_path / name).to_pylist()[0]
        count = len(records[0]["completion_ids"])
        assert np.shape(line["candidate_logprobs"]) == (count, 3)
        assert np.shape(line["top_tokens"]) == np.shape(line["top_logprobs"]) == (count, 2)
        assert np.shape(line["steps"]) == (len(line["step_positions"]), 1)
        assert {"prompt_value", "bootstrap", "reward", "advantages", "returns", "token_ids"} <= line.keys()
