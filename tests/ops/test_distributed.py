"""Two gloo processes: DDP, FSDP2, DTensor. One spawn runs all, since starting processes is what takes the time."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn

from tests.two_processes import RANKS, outcomes_of
from vhead.ops import init_linear_, init_normal_, value_head

COLUMNS, P = 37, 0.3


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.summary = nn.Linear(COLUMNS, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return value_head(hidden, self.summary.weight, self.summary.bias, dropout_p=P, seed=5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(COLUMNS, COLUMNS), Head()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.body(hidden))


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def batch() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2 * RANKS, 5, COLUMNS)


def own(rank: int) -> Tensor:
    return batch()[2 * rank : 2 * rank + 2]


def average_gradients(rank: int) -> list[Tensor]:
    """What data parallelism must give: each rank's own gradients, averaged by hand."""
    single = model()
    single(own(rank)).square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in single.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [gradient / RANKS for gradient in gradients]


def check_data_parallel(rank: int) -> None:
    wrapped = nn.parallel.DistributedDataParallel(model())
    wrapped(own(rank)).square().mean().backward()
    for parameter, expected in zip(wrapped.parameters(), average_gradients(rank), strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def check_fully_sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    sharded = model()
    fully_shard(sharded.head)
    fully_shard(sharded)
    sharded(own(rank)).square().mean().backward()
    for parameter, expected in zip(sharded.parameters(), average_gradients(rank), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), expected)


def check_sharded_init(rank: int) -> None:
    """Whatever each rank's generator says, the parameter is one."""
    from torch.distributed.fsdp import fully_shard

    sharded = model()
    fully_shard(sharded)
    layer = sharded.head.summary
    for init_ in (init_linear_, lambda weight, bias: init_normal_(weight, bias, 0.2)):
        torch.manual_seed(10 + rank)
        init_(layer.weight, layer.bias)
        torch.manual_seed(10)
        whole = nn.Linear(COLUMNS, 1)
        torch.manual_seed(10)
        init_(whole.weight, whole.bias)
        assert torch.equal(layer.weight.full_tensor(), whole.weight)


def check_dtensor(_rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    weight = model().head.summary.weight.detach()
    for p in (0.0, P):
        plain = [batch().requires_grad_(), weight.clone().requires_grad_()]
        expected = value_head(*plain, dropout_p=p, seed=5)
        expected.sum().backward()
        for placement in (Shard(0), Shard(1), Replicate()):
            hidden = distribute_tensor(batch(), mesh, [placement]).requires_grad_()
            sharded = [hidden, distribute_tensor(weight, mesh, [Replicate()]).requires_grad_()]
            values = value_head(*sharded, dropout_p=p, seed=5)
            assert isinstance(values, DTensor)
            torch.testing.assert_close(values.full_tensor(), expected)
            values.sum().backward()
            for ours, theirs in zip(sharded, plain, strict=True):
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


CHECKS: list[Callable[[int], None]] = [check_data_parallel, check_fully_sharded, check_sharded_init, check_dtensor]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return outcomes_of(CHECKS)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="torch >= 2.6")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(check, outcomes) -> None:
    assert outcomes[check.__name__] == ["passed"] * RANKS
