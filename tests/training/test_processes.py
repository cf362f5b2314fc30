"""Two gloo processes update one model with DDP and FSDP2, with shares of rollouts that are not equal."""

import numpy as np
import pytest
import torch
import torch.distributed.fsdp

from tests.trainers.toy_task import language_model
from tests.training.padded_loop import rollouts
from tests.training.test_gradients import with_head
from tests.two_processes import RANKS, outcomes_of
from vhead import Rollout, TrainingPass, VheadError, freeze, losses
from vhead.errors import FieldError


def share(rank):
    """Seven of nine rollouts for the first process, which are more batches than the other one's."""
    return rollouts()[:7] if rank == 0 else rollouts()[7:]


def made():
    return TrainingPass(with_head(language_model(tied=False)), token_budget=45)


def update(module, batches):
    for batch in batches:
        out = module(batch)
        old, ones = torch.full_like(out.logprobs, -5.0), torch.ones_like(out.values)
        common = {"mask": batch.mask, "totals": batch.totals}
        loss = losses.value(out.values, ones, **common) + losses.policy(out.logprobs, old, ones, clip=1.0, **common)
        loss.backward()


def assert_same_gradients(training_pass):
    alone = made()
    update(alone, alone.batches(rollouts(), alone=True))
    expected = dict(alone.named_parameters())
    for name, parameter in training_pass.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def check_ddp(rank):
    training_pass = made()
    batches = training_pass.batches(share(rank))
    own = training_pass.batches(share(rank), alone=True)
    assert (len(own) < len(batches)) == (rank == 1)
    update(torch.nn.parallel.DistributedDataParallel(training_pass), batches)
    assert_same_gradients(training_pass)


def check_fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    training_pass = made()
    for layer in training_pass.model.pretrained_model.model.layers:
        fully_shard(layer)
    fully_shard(training_pass)
    update(training_pass, training_pass.batches(share(rank)))
    assert_same_gradients(training_pass)


def check_fsdp2_with_states_for_which_one_process_has_no_room(rank):
    from torch.distributed.fsdp import fully_shard

    model = with_head(language_model(tied=False))
    freeze(model, "body")
    training_pass = TrainingPass(model, token_budget=45, returns=["values"], keep_states=2000)
    for layer in model.pretrained_model.model.layers:
        fully_shard(layer)
    fully_shard(training_pass)
    batches = training_pass.batches(share(rank))
    values = [[training_pass(batch).values for batch in batches] for _ in range(2)]
    torch.testing.assert_close(*values)


def with_candidates(given, count=3):
    return [Rollout(r.prompt, r.completion, candidates=np.stack([r.completion] * count, axis=1)) for r in given]


def check_candidates_are_there_in_empty_batches_too(rank):
    training_pass = TrainingPass(language_model(tied=False), token_budget=45)
    batches = training_pass.batches(with_candidates(share(rank)))
    module = torch.nn.parallel.DistributedDataParallel(training_pass)
    for batch in batches:
        (module(batch).candidate_logprobs.sum() / batch.totals.tokens).backward()
    assert any(not len(batch) for batch in batches) == (rank == 1)


def check_a_rollout_that_one_process_refuses_stops_all(rank):
    given = [*share(rank), Rollout([1], [5] * 60)] if rank else share(rank)
    with pytest.raises(FieldError if rank else VheadError, match="at most the token_budget" if rank else "1 of 2"):
        made().batches(given)


def check_candidates_of_another_number_stop_all(rank):
    given = with_candidates(share(rank), count=3 - rank)
    with pytest.raises(VheadError, match="candidates: expected rollouts of all processes to have as many"):
        made().batches(given)
    assert made().batches(with_candidates(share(rank)) if rank else [])


def check_a_model_that_is_wrapped_already_is_refused(rank):
    with pytest.raises(VheadError, match="make the TrainingPass first and wrap that"):
        TrainingPass(torch.nn.parallel.DistributedDataParallel(with_head(language_model())))


def numbers():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(20, generator=generator), 3 * torch.randn(20, generator=generator) + torch.arange(20)


def check_metrics_are_those_of_the_tokens_of_all_processes(rank):
    values, returns = numbers()
    bounds = [(0, 3), (3, 5)] if rank == 0 else [(5, 20)]
    parts = [losses.value_metrics(values[start:stop], returns[start:stop]) for start, stop in bounds]
    expected = losses.value_metrics(values, returns)
    found = losses.combined_metrics(parts, across_processes=True)
    assert dict(found) == pytest.approx(dict(expected), rel=1e-9)
    assert dict(losses.combined_metrics(parts)) != pytest.approx(dict(expected), rel=1e-3)


def check_metrics_that_one_process_lacks_stop_all(rank):
    parts = [losses.value_metrics(*numbers())] if rank else []
    with pytest.raises(VheadError if rank else ValueError, match="1 of 2 refused" if rank else "at least one batch"):
        losses.combined_metrics(parts, across_processes=True)


CHECKS = [
    check_metrics_are_those_of_the_tokens_of_all_processes,
    check_metrics_that_one_process_lacks_stop_all,
    check_ddp,
    check_fsdp2,
    check_fsdp2_with_states_for_which_one_process_has_no_room,
    check_candidates_are_there_in_empty_batches_too,
    check_a_rollout_that_one_process_refuses_stops_all,
    check_candidates_of_another_number_stop_all,
    check_a_model_that_is_wrapped_already_is_refused,
]


@pytest.fixture(scope="module")
def outcomes():
    return outcomes_of(CHECKS)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="torch >= 2.6")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(check, outcomes):
    assert outcomes[check.__name__] == ["passed"] * RANKS
