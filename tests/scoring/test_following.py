"""A scorer that follows a directory: the newest weights between two batches, and which ones scored what."""

import threading
import time

import numpy as np
import pytest
import torch

from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.errors import SyncStepError
from vhead.sync import Publisher


def critic(seed):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path()).eval()
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.v_head.summary.weight)
    return model


def rollouts(count=12):
    generator = torch.Generator().manual_seed(0)
    return [Rollout(*torch.randint(9, (2, 6), generator=generator).tolist()) for _ in range(count)]


class PublishesOnTheWay:
    """Rollouts whose reading is followed by a publication now and then."""

    def __init__(self, given, publish):
        self.given, self.publish = given, publish

    def __iter__(self):
        for place, rollout in enumerate(self.given):
            if place % 4 == 0:
                self.publish(place // 4)
            yield rollout


def test_scores_of_each_step_are_those_of_a_scorer_that_has_only_that_step(tmp_path):
    publisher, models = Publisher(tmp_path), {step: critic(step) for step in range(3)}
    scorer = Scorer(critic(9), follow=tmp_path, token_budget=24, chunk_tokens=24, batch_invariant=True)
    publish = lambda step: publisher.publish(models[step], step=step)  # noqa: E731
    scores = list(scorer.stream(PublishesOnTheWay(rollouts(), publish)))
    assert {score.weights_step for score in scores} > {0, 2} or {score.weights_step for score in scores} == {0, 1, 2}
    for step in {score.weights_step for score in scores}:
        alone = Scorer(models[step], token_budget=24, batch_invariant=True).score(rollouts())
        for score in scores:
            if score.weights_step == step:
                assert np.array_equal(score.values, alone[score.index].values)
                assert np.array_equal(score.logprobs, alone[score.index].logprobs)


def test_without_a_publication_the_scorer_s_own_weights_score(tmp_path):
    scores = Scorer(critic(1), follow=tmp_path).score(rollouts(2))
    assert scores.weights_step.tolist() == [-1, -1]
    assert "weights_step" in scores.columns


def test_min_step_refuses_or_waits(tmp_path):
    publisher, model = Publisher(tmp_path), critic(1)
    publisher.publish(model.v_head, step=1)
    with pytest.raises(SyncStepError, match="step 2 or later in"):
        Scorer(critic(2), follow=tmp_path, min_step=2).score(rollouts(1))
    scorer = Scorer(critic(2), follow=tmp_path, min_step=2, patience=60)

    def publish_later():
        time.sleep(0.2)
        publisher.publish(model.v_head, step=2)

    thread = threading.Thread(target=publish_later)
    thread.start()
    assert scorer.score(rollouts(1)).weights_step.tolist() == [2]
    thread.join()
    with pytest.raises(ValueError, match="min_step: expected a directory"):
        Scorer(critic(2), min_step=2)


def test_a_damaged_publication_is_a_warning_and_no_rollout_is_lost(tmp_path, caplog):
    publisher, scorer = Publisher(tmp_path), Scorer(critic(2), follow=tmp_path)
    publisher.publish(critic(1).v_head, step=1)
    first = scorer.score(rollouts(3))
    publisher.publish(critic(3).v_head, step=2)
    file = tmp_path / "step-00000002" / "v_head.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    again = scorer.score(rollouts(3))
    assert again.weights_step.tolist() == [1, 1, 1]
    assert np.array_equal(again.values, first.values)
    assert "scoring goes on with the weights of step 1" in caplog.text
