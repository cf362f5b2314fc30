"""Publishing from transformers' `Trainer`, and from a model that two processes have shards of."""

import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp

from tests.sync.conftest import bits
from tests.trainers.toy_task import language_model
from tests.two_processes import RANKS, outcomes_of
from vhead import AutoModelForCausalLMWithValueHead
from vhead.errors import SyncStepError
from vhead.sync import Follower, PublishCallback, Publisher, publications


def critic(seed):
    model = AutoModelForCausalLMWithValueHead(language_model())
    torch.manual_seed(seed)
    for parameter in model.v_head.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3]), (2, [2, 3])])
def test_the_callback_publishes_each_so_many_steps_and_the_last(tmp_path, every, steps):
    pytest.importorskip("accelerate")
    from tests.trainers.test_trainer import trainer

    model, other = critic(1), critic(2)
    training = trainer(model, tmp_path / "run")
    training.args.max_steps, training.args.save_strategy = 3, "no"
    training.add_callback(PublishCallback(tmp_path / "weights", every=every))
    training.train()
    assert [entry.step for entry in publications(tmp_path / "weights")] == steps
    assert Follower(tmp_path / "weights").apply(other) == 3
    assert bits(other) == bits(model)


def test_the_callback_refuses_to_publish_never(tmp_path):
    with pytest.raises(ValueError, match="every: expected at least 1"):
        PublishCallback(tmp_path, every=0)


def sharded(seed):
    from torch.distributed.fsdp import fully_shard

    model = critic(seed)
    for layer in model.pretrained_model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def check_full_and_changed_weights_arrive(folder):
    model, publisher, follower = sharded(3), Publisher(folder / "weights", delta=True), Follower(folder / "weights")
    other, expected = critic(4), critic(3)
    for step in (1, 2):
        assert publisher.publish(model, step=step).is_full == (step == 1)
        dist.barrier()
        assert follower.apply(other) == step
        assert bits(other) == bits(expected)
        with torch.no_grad():
            for parameter in (*model.parameters(), *expected.parameters()):
                parameter.mul_(0.5)
        dist.barrier()


def check_a_refusal_reaches_all_processes(folder):
    model, publisher = sharded(3), Publisher(folder / "weights")
    with pytest.raises(SyncStepError, match="expected one above 2"):
        publisher.publish(model, step=2)
    dist.barrier()


def check_no_two_whole_tensors_are_in_memory_at_a_time(folder):
    from torch.distributed.tensor import DTensor

    model, gathered, gather = sharded(3), [], DTensor.full_tensor

    def watched(tensor, **options):
        assert all(whole() is None for whole in gathered)
        whole = gather(tensor, **options)
        gathered.append(weakref.ref(whole))
        return whole

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", watched)
        Publisher(folder / "watched").publish(model, step=1)
    assert len(gathered) == len(list(model.parameters()))


CHECKS = [
    check_full_and_changed_weights_arrive,
    check_a_refusal_reaches_all_processes,
    check_no_two_whole_tensors_are_in_memory_at_a_time,
]


@pytest.fixture(scope="module")
def outcomes():
    return outcomes_of(CHECKS, in_folder=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="torch >= 2.6")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_sharded_model(check, outcomes):
    assert outcomes[check.__name__] == ["passed"] * RANKS
