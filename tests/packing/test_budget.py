"""How many tokens a batch has where nobody says so; the clock is the test's own."""

import json
import os

import pytest
import torch

from tests.scoring.scoring_models import critic, trees, worst
from vhead import Scorer
from vhead.errors import EnvironmentVariableError
from vhead.packing import budget, strategies


@pytest.fixture(autouse=True)
def measures(monkeypatch, tmp_path):
    """A process that has found nothing, with a cache folder of its own."""
    monkeypatch.delenv("VHEAD_TOKEN_BUDGET")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(budget, "_found", {})
    monkeypatch.setattr(budget, "_USUAL", {"cpu": 128})


@pytest.fixture
def tried(monkeypatch) -> list[int]:
    """The sizes of the batches that are tried, on a clock by which a batch of 256 tokens takes no longer than any."""
    sizes: list[int] = []
    at_work = [False]
    own, states, clock = budget._fastest, strategies.Body.states, [0.0]

    def fastest(*arguments):
        at_work[0] = True
        try:
            return own(*arguments)
        finally:
            at_work[0] = False

    def counted(self, tokens, **inputs):
        if at_work[0]:
            sizes.append(tokens.numel())
            clock[0] += 0.01
        return states(self, tokens, **inputs)

    monkeypatch.setattr(budget, "_fastest", fastest)
    monkeypatch.setattr(strategies.Body, "states", counted)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])
    return sizes


def noted() -> dict[str, int]:
    return json.loads(budget._path().read_text())


def test_the_size_with_the_least_time_a_token_is_chosen_and_the_plan_says_so(tried):
    scorer = Scorer(critic("llama"))
    assert scorer.token_budget == 256
    assert "batches: 256 tokens, measured here to be faster than the usual 128" in str(scorer.plan)
    assert set(tried) == {64, 128, 256}
    assert list(noted().values()) == [256]


def test_one_layer_is_tried_and_the_model_is_whole_afterwards(tried, monkeypatch):
    model = critic("llama")
    layers, counts = model.pretrained_model.model.layers, []
    own = budget._seconds
    monkeypatch.setattr(
        budget, "_seconds", lambda body, *rest: counts.append(layer_count(body.model)) or own(body, *rest)
    )
    scorer = Scorer(model)
    assert set(counts) == {1}
    assert model.pretrained_model.model.layers is layers
    assert layer_count(model.pretrained_model) == 2
    assert worst(model, trees(), scorer.score(trees(), ["values"])) < 1e-4


def layer_count(model: torch.nn.Module) -> int:
    return len(model.model.layers)


def test_another_process_takes_what_was_noted(tried):
    Scorer(critic("llama"))
    length = len(tried)
    budget._found.clear()
    assert Scorer(critic("llama")).token_budget == 256
    assert len(tried) == length
    # Another model has a note of its own.
    Scorer(critic("llama", intermediate_size=64))
    assert len(tried) == 2 * length
    assert len(noted()) == 2


@pytest.mark.parametrize("content", ["", "[", "[1]", '{"a": "b"}', "\x00", "[" * 100_000])
def test_a_note_that_nobody_can_read_is_written_anew(tried, content):
    budget._path().parent.mkdir(parents=True)
    budget._path().write_text(content)
    assert Scorer(critic("llama")).token_budget == 256
    assert list(noted().values()) == [256]


def test_a_cache_folder_that_cannot_be_written_costs_a_measurement_in_each_process(tried, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Scorer(critic("llama")).token_budget == 256
    length = len(tried)
    assert Scorer(critic("llama")).token_budget == 256
    assert len(tried) == length
    assert os.listdir(tmp_path) == ["file"]


def test_a_small_difference_is_none(tried, monkeypatch):
    monkeypatch.setattr(budget, "_FASTER", 2.1)
    scorer = Scorer(critic("llama"))
    assert scorer.token_budget == 128
    assert "batches: 128 tokens, the usual size, which no other one has beaten here" in str(scorer.plan)


def test_a_model_that_is_slow_is_not_tried_for_long(tried, monkeypatch):
    monkeypatch.setattr(budget, "_PATIENCE_S", 0.035)
    assert Scorer(critic("llama")).token_budget == 128
    assert len(tried) <= 5


def test_memory_bounds_what_is_tried_on_a_cpu(tried, monkeypatch):
    monkeypatch.setattr(budget, "_MOST_BYTES", 2 * 256 * 48 * 4 - 1)
    assert Scorer(critic("llama")).token_budget == 128
    assert max(tried) <= 128


@pytest.mark.parametrize("error", [RuntimeError("only two layers"), torch.cuda.OutOfMemoryError("too large")])
def test_a_model_that_cannot_be_tried_has_the_usual_size(tried, monkeypatch, error):
    def fail(*_arguments):
        raise error

    monkeypatch.setattr(budget, "_seconds", fail)
    assert Scorer(critic("llama")).token_budget == 128


def test_what_is_asked_for_is_taken(tried, monkeypatch):
    assert "batches: 100 tokens, as asked for" in str(Scorer(critic("llama"), token_budget=100).plan)
    monkeypatch.setenv("VHEAD_TOKEN_BUDGET", "300")
    assert "batches: 300 tokens, as VHEAD_TOKEN_BUDGET says" in str(Scorer(critic("llama")).plan)
    assert not tried
    monkeypatch.setenv("VHEAD_TOKEN_BUDGET", "many")
    with pytest.raises(
        EnvironmentVariableError, match="VHEAD_TOKEN_BUDGET: expected a whole number from 1 on, got 'many'"
    ):
        Scorer(critic("llama"))


def test_batch_invariant_scores_have_nothing_to_do_with_it(tried, monkeypatch):
    model = critic("llama")
    scorer = Scorer(model, batch_invariant=True)
    assert not tried
    assert "batches of one sequence" in scorer.plan.batches
    monkeypatch.setenv("VHEAD_TOKEN_BUDGET", "30")
    other = Scorer(model, batch_invariant=True)
    first, second = (each.score(trees(), ["values", "logprobs"]) for each in (scorer, other))
    assert (first.values == second.values).all()
    assert (first.logprobs == second.logprobs).all()
