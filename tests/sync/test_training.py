"""Publishing from transformers' `Trainer`, and from a model that two processes have shards of."""

import weakref
from types import SimpleNamespace

import fsspec
import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp

from tests.sync.conftest import bits
from tests.trainers.toy_task import language_model
from tests.two_processes import RANKS, outcomes_of
from vhead import AutoModelForCausalLMWithValueHead
from vhead.errors import PublicationMismatchError, SyncFileError, SyncStepError
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


def check_a_store_that_refuses_is_told_to_all_processes(folder):
    model = sharded(3)
    publisher = Publisher(f"memory://{folder.name}/refused", staging=folder)

    def refuse(*_):
        raise OSError("full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "put_file", refuse)
        with pytest.raises(SyncFileError, match="full"):
            publisher.publish(model, step=1)
    assert publisher.publish(model, step=2).step == publisher.step == 2


def check_a_failure_in_one_process_is_raised_in_all_and_nothing_is_published(folder):
    from torch.distributed.tensor import DTensor

    model, publisher = sharded(3), Publisher(folder / "failed")
    for failing in range(RANKS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DTensor, "full_tensor", refused(DTensor.full_tensor, dist.get_rank() == failing))
            with pytest.raises(MemoryError, match="no room"):
                publisher.publish(model, step=1)
        assert not publications(folder / "failed")
        dist.barrier()
    assert publisher.publish(model, step=1).step == publisher.step == 1


def refused(gather, fails):
    """Gathers a tensor and has no room for it, in the process that fails."""

    def full_tensor(tensor, **options):
        whole = gather(tensor, **options)
        if fails and tensor.numel() > 8:
            raise MemoryError("no room")
        return whole

    return full_tensor


def check_processes_with_other_tensors_are_told(folder):
    model, publisher = sharded(3), Publisher(folder / "other")
    if dist.get_rank():
        model.more = torch.nn.Parameter(torch.randn(2))
    with pytest.raises(PublicationMismatchError, match="others in process 1: more"):
        publisher.publish(model, step=1)


def check_the_callback_publishes_the_last_step_once_in_all_processes(folder):
    callback, model = PublishCallback(folder / "callback"), sharded(3)
    state = SimpleNamespace(global_step=1, is_world_process_zero=dist.get_rank() == 0, epoch=0.5)
    callback.on_step_end(None, state, None, model=model)
    assert callback._publisher.step == 1
    callback.on_train_end(None, state, None, model=model)
    dist.barrier()
    assert [entry.step for entry in publications(folder / "callback")] == [1]


CHECKS = [
    check_a_store_that_refuses_is_told_to_all_processes,
    check_a_failure_in_one_process_is_raised_in_all_and_nothing_is_published,
    check_processes_with_other_tensors_are_told,
    check_the_callback_publishes_the_last_step_once_in_all_processes,
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
