"""Two gloo processes update one model with DDP and FSDP2, with shares of rollouts that are not equal."""

import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp

from tests.trainers.toy_task import language_model
from tests.training.padded_loop import rollouts
from tests.training.test_gradients import with_head
from vhead import TrainingPass, VheadError, losses

RANKS = 2


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


def check_a_model_that_is_wrapped_already_is_refused(rank):
    with pytest.raises(VheadError, match="make the TrainingPass first and wrap that"):
        TrainingPass(torch.nn.parallel.DistributedDataParallel(with_head(language_model())))


CHECKS = [check_ddp, check_fsdp2, check_a_model_that_is_wrapped_already_is_refused]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for check in CHECKS:
        try:
            check(rank)
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        Path(folder, f"{check.__name__}.{rank}").write_text(outcome)
        if outcome != "passed":
            raise RuntimeError(outcome)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes():
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(run_rank, (folder,), nprocs=RANKS, join=False)
        try:
            while not context.join(timeout=120):
                pass
        except torch.multiprocessing.ProcessRaisedException:
            pass  # The files say what failed, by name.

        def read(path):
            return path.read_text() if path.exists() else "did not run"

        return {c.__name__: [read(Path(folder, f"{c.__name__}.{rank}")) for rank in range(RANKS)] for c in CHECKS}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="torch >= 2.6")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(check, outcomes):
    assert outcomes[check.__name__] == ["passed"] * RANKS
