"""torch, Rust, cudarc, driver, kernel: token statistics have the CPU's bits where the tiles are the same."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda.emulated import device
from tests.cuda.emulated.conftest import DTYPES, same_bits
from vhead.errors import CudaError
from vhead.ops import statistics_of_logits, token_logprobs, token_statistics, token_statistics_plain
from vhead.ops.token_statistics import arguments, cuda, functions, kernels, operator, tiles
from vhead.ops.token_statistics.cpu import CpuTiling
from vhead.ops.token_statistics.cuda import CudaTiling

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "capped": {"softcap": 5.0, "scale": 1.5, "temperature": 0.8},
}
HALVES = DTYPES[1:]
# torch asks the driver as well, and finds it too old.
pytestmark = pytest.mark.filterwarnings("ignore:CUDA initialization:UserWarning")


@dataclass
class Tokens:
    """Arguments of `token_statistics`, random."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None

    def run(self, function=token_statistics, **rule) -> tuple[Tensor, ...]:
        return function(self.hidden, self.weight, self.targets, bias=self.bias, **rule)

    def gradients(self, function=token_statistics, size: float = 1.0, **rule) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (self.hidden, self.weight, self.bias)]
        found = function(*leaves[:2], self.targets, bias=leaves[2], **rule)[:2]
        rows = len(self.targets)
        above = [size * x.to(found[0].dtype) for x in (torch.linspace(-1, 2, rows), torch.linspace(3, -2, rows))]
        return list(torch.autograd.grad(found, leaves, above))

    def double(self) -> "Tokens":
        return replace(self, hidden=self.hidden.double(), weight=self.weight.double(), bias=self.bias.double())


def tokens(rows: int, columns: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tokens:
    weight = (torch.randn(vocabulary, columns) * 3 / columns**0.5).to(dtype)
    hidden, targets = torch.randn(rows, columns).to(dtype), torch.randint(vocabulary, (rows,))
    return Tokens(hidden, weight, targets, torch.randn(vocabulary).to(dtype))


@pytest.fixture
def on_device(monkeypatch) -> Iterator[None]:
    """Sends CPU tensors to the device's kernels, whose memory is the process's own."""
    for module in (operator, functions):
        monkeypatch.setattr(module, "tiling_for", lambda *_: CudaTiling())
    with device.memory():
        yield


@pytest.fixture
def same_tiles(monkeypatch) -> None:
    """The CPU's tiles, so that torch's multiplications are the same."""
    # The processor's matrix unit adds in another order.
    monkeypatch.setattr(CpuTiling, "multiplies", lambda *_: False)
    monkeypatch.setattr(CudaTiling, "plan", lambda _self, *arguments, **named: CpuTiling().plan(*arguments, **named))
    monkeypatch.setattr(CpuTiling, "ROWS", 16)


@pytest.fixture
def widening(monkeypatch) -> None:
    """A torch that multiplies half precisions into float32, as it does on CUDA devices only."""

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        assert a.dtype == b.dtype != out_dtype
        return torch.mm(a.float(), b.float(), out=out)

    for module in (tiles, cuda):
        monkeypatch.setattr(module, "can_widen", lambda *_: True)
    monkeypatch.setattr(tiles, "_mm", mm)


def expected_and_found(case: Tokens, request, **rule) -> tuple[list[Tensor], list[Tensor]]:
    """Statistics and gradients by the CPU's kernels, then by the device's."""
    expected = [*case.run(**rule)[:3], *case.gradients(**rule)]
    request.getfixturevalue("on_device")
    return expected, [*case.run(**rule)[:3], *case.gradients(**rule)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("same_tiles")
def test_the_cpu_s_bits(request, driver, dtype, rule) -> None:
    case = tokens(37, 24, 2500, dtype)
    expected, found = expected_and_found(case, request, **rule)
    assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True))
    launched = driver.kernels()
    assert launched.count("token_statistics_fold") == 2 * 9
    assert launched.count("token_statistics_differentiate_float32") == 9
    other = case.run(**{**rule, "temperature": 1.01 * rule.get("temperature", 1.0)})
    assert not same_bits(other[0], expected[0]), "the check can fail"


def test_its_own_tiles(request, driver) -> None:
    case = tokens(50, 24, 20000)
    expected, found = expected_and_found(case, request)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert driver.kernels().count("token_statistics_fold") == 2, (
        "few rows: one tile, once for the statistics and once for gradients"
    )


@pytest.mark.usefixtures("on_device")
def test_many_rows_have_several_tiles(driver, monkeypatch) -> None:
    monkeypatch.setattr(CudaTiling, "ROWS", 20)
    monkeypatch.setattr(CudaTiling, "PRODUCTS", 1)
    case = tokens(50, 8, 17000)
    torch.testing.assert_close(
        case.run()[0], case.double().run(token_statistics_plain)[0].float(), rtol=1e-4, atol=1e-4
    )
    lines = [line for line in driver.launches() if "fold" in line]
    assert len(lines) == 9, "three of rows by three of columns"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("on_device", "widening")
def test_half_precisions_as_they_are(driver, dtype) -> None:
    case = tokens(40, 64, 9000, dtype)
    exact = case.double()
    for mine, true in zip(case.run()[:3], exact.run(token_statistics_plain)[:3], strict=True):
        torch.testing.assert_close(mine, true.float(), rtol=1e-4, atol=1e-4)
    driver.launches()
    found, twin = case.gradients(), case.gradients(token_statistics_plain)
    assert f"token_statistics_differentiate_{str(dtype).removeprefix('torch.')}" in driver.kernels()
    for mine, plain, true in zip(found, twin, exact.gradients(token_statistics_plain), strict=True):
        # Gradients of products are rounded once more than the twin's.
        assert rms(mine - true) <= 2 * rms(plain - true) + 2.0**-9 * rms(true)


@pytest.mark.usefixtures("on_device", "widening")
def test_small_gradients_stay_above_float16_s_range(monkeypatch) -> None:
    """A mean over a long batch gives gradients of 1e-6, and those of products are smaller still."""
    case = replace(tokens(20, 64, 9000, torch.float16), bias=torch.randn(9000))  # whose gradient is not rounded again
    exact = case.double().gradients(token_statistics_plain, size=1e-6)[2]
    assert rms(case.gradients(size=1e-6)[2] - exact) < 1e-3 * rms(exact)
    monkeypatch.setattr(kernels, "_power_of_two", lambda _: torch.ones(()))
    assert rms(case.gradients(size=1e-6)[2] - exact) > 1e-2 * rms(exact), "the check can fail"


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 7), (1, 1), (3, 2)])
@pytest.mark.usefixtures("same_tiles")
def test_small_sizes(request, rows, vocabulary) -> None:
    expected, found = expected_and_found(tokens(rows, 5, vocabulary), request)
    assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("on_device", "widening")
def test_no_rows_in_half_precision(dtype) -> None:
    found = tokens(0, 5, 7, dtype).gradients()
    assert found[0].shape == (0, 5)
    assert not found[1].any()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("same_tiles")
def test_candidates_and_the_likeliest_tokens_are_the_cpu_s(request, monkeypatch, driver, dtype, rule) -> None:
    monkeypatch.setattr(CpuTiling, "COLUMNS", 1024)
    case = tokens(37, 24, 2500, dtype)
    candidates = torch.cat((case.targets[:, None], torch.randint(2500, (37, 6))), 1)
    expected = case.run(**rule, candidates=candidates, top=20)
    request.getfixturevalue("on_device")
    found = case.run(**rule, candidates=candidates, top=20)
    assert same_bits(found.candidate_logprobs, expected.candidate_logprobs)
    assert same_bits(found.top_logprobs, expected.top_logprobs)
    assert torch.equal(found.top_tokens, expected.top_tokens)
    assert same_bits(found.candidate_logprobs[:, 0].contiguous(), found.logprobs)
    launched = driver.kernels()
    assert launched.count("token_statistics_fold_selected") == 9, "tiles of rows and of columns"
    assert launched.count("token_statistics_fold") == 0
    assert not torch.allclose(found.candidate_logprobs.roll(1, 0), expected.candidate_logprobs), "the check can fail"


@pytest.mark.usefixtures("on_device", "same_tiles")
def test_candidates_need_not_be_contiguous_and_may_be_asked_for_alone() -> None:
    case = tokens(5, 8, 2500)
    candidates = torch.randint(2500, (6, 5)).T
    found = case.run(candidates=candidates)
    assert same_bits(found.candidate_logprobs, case.run(candidates=candidates.contiguous()).candidate_logprobs)
    assert found.top_tokens is None
    assert case.run(top=3).candidate_logprobs is None
    assert same_bits(case.run(candidates=candidates, top=3).top_logprobs, case.run(top=3).top_logprobs)


@pytest.mark.usefixtures("on_device", "same_tiles")
def test_no_rows_and_no_candidates() -> None:
    assert tokens(0, 5, 7).run(candidates=torch.empty(0, 4, dtype=torch.int64), top=3).top_tokens.shape == (0, 3)
    found = tokens(2, 5, 7).run(candidates=torch.empty(2, 0, dtype=torch.int64), top=3)
    assert found.candidate_logprobs.shape == (2, 0)
    assert found.top_tokens.shape == (2, 3)


@pytest.mark.usefixtures("on_device", "same_tiles")
def test_selected_tokens_of_rows_that_are_not_finite_and_of_equals() -> None:
    logits = torch.full((4, 3000), -torch.inf)
    logits[:, [9, 2500, 2000]] = 1.5
    logits[1, 7], logits[2, 7] = torch.nan, torch.inf
    logits[3] = -torch.inf
    found = statistics_of_logits(logits, torch.full((4,), 9), candidates=torch.tensor([[9, 0]] * 4), top=4)
    assert found.top_tokens.tolist() == [[9, 2000, 2500, 0], *[[-1] * 4] * 3]
    assert found.candidate_logprobs[0].tolist() == [found.logprobs[0].item(), -math.inf]
    assert found.top_logprobs[1:].isnan().all()
    assert found.candidate_logprobs[1:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_there(request, dtype) -> None:
    logits, targets = (torch.randn(40, 6000) * 4).to(dtype)[::2, :3000], torch.randint(3000, (20,), dtype=torch.int32)
    expected = statistics_of_logits(logits, targets, temperature=0.7)
    request.getfixturevalue("on_device")
    found = statistics_of_logits(logits, targets, temperature=0.7)
    assert all(same_bits(a, b) for a, b in zip(expected[:3], found[:3], strict=True))
    assert torch.equal(expected.is_top1, found.is_top1)


class Operations(TorchDispatchMode):
    """Notes torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


# What a host gets from a device, and waits for.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::item"}


@pytest.mark.usefixtures("on_device", "widening")
def test_nothing_waits_for_the_device(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "check_range", lambda *_: None)  # on a CPU it waits; the next test is its own
    case = tokens(9, 16, 3000, torch.float16)
    rule, above, candidates = (1.0, None, 1.0), torch.randn(2, 9), torch.randint(3000, (9, 4))
    with Operations() as seen:  # inside the operators, which a dispatch mode does not look into
        found = operator.forward(case.hidden, case.weight, case.targets, None, *rule, False, candidates, 5)
        _, entropy, _, _, peak, log_sum, *_ = found
        statistics = (peak, log_sum, entropy)
        tensors = (case.hidden, case.weight, case.targets, None)
        operator.backward(*above, *tensors, *statistics, *rule, (True, True, False))
    assert "aten::mm" in seen.names
    assert seen.names & WAITING == set()
    with Operations() as seen:
        arguments.check_range(case.targets, 3000)
    assert seen.names & WAITING, "the check can fail"


class OnCuda(Tensor):
    """A tensor that says it is on a CUDA device."""

    is_cuda = True


@pytest.mark.skipif(torch.__version__ < "2.5", reason="before torch 2.5 a dispatch mode wraps no tensor twice")
def test_targets_are_checked_on_the_device() -> None:
    targets = torch.tensor([0, 5, 3]).as_subclass(OnCuda)
    arguments.check_range(targets, 6)
    with Operations() as seen, pytest.raises(RuntimeError, match=r"targets: expected token ids below 5"):
        arguments.check_range(targets, 5)
    assert seen.names & WAITING == set()
    assert "aten::_assert_async" in seen.names


@pytest.mark.usefixtures("on_device")
def test_targets_outside_the_vocabulary() -> None:
    case = tokens(3, 5, 40)
    with pytest.raises(ValueError, match=r"^candidates: expected token ids below 40, got -1 in row 2$"):
        case.run(candidates=torch.tensor([[0, 1], [2, 39], [3, -1]]))
    case.targets[1] = 40
    with pytest.raises(ValueError, match=r"^targets: expected token ids below 40, got 40 in row 1$"):
        case.run(token_logprobs)
    found = device.LogitStatistics(case.targets, 40, None, 1.0, None, 1.0)
    found.fold(torch.randn(3, 40), 0, 0)
    assert found.finish()[0].isnan().tolist() == [False, True, False]


T = torch.tensor([0, 4, 2])


def test_tiles_are_checked() -> None:
    found = device.LogitStatistics(T, 5, None, 1.0, None, 1.0)
    wrong = [
        ((torch.ones(3, 5), 1, 0), ValueError, r"^rows: expected 2 elements, got 3$"),
        ((torch.ones(3, 6), 0, 0), ValueError, r"^columns: expected 5 elements, got 6$"),
        ((torch.ones(3, 2), 0, 3), ValueError, r"^column: expected a multiple of 1024, got 3$"),
        ((torch.ones(15), 0, 0), ValueError, r"^products: expected \[n, v\], got \[15\]$"),
        ((torch.ones(3, 5).double(), 0, 0), TypeError, r"^products: expected float32, got float64$"),
    ]
    for tile, error, message in wrong:
        with pytest.raises(error, match=message):
            found.fold(*tile)
    with pytest.raises(ValueError, match=r"^bias: expected 5 elements, got 4$"):
        device.LogitStatistics(T, 5, torch.ones(4), 1.0, None, 1.0)
    with pytest.raises(ValueError, match=r"^candidates: expected \[3, M\], got \[2, 4\]$"):
        device.LogitStatistics(T, 5, None, 1.0, None, 1.0, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^top: expected at most 128, got 129$"):
        device.LogitStatistics(T, 5, None, 1.0, None, 1.0, None, 129).fold(torch.ones(3, 5), 0, 0)
    numbers = (torch.ones(3),) * 3
    with pytest.raises(ValueError, match=r"^grad_entropy: expected 3 elements, got 2$"):
        device.LogitGradients(T, 5, None, 1.0, None, 1.0, numbers, (torch.ones(3), torch.ones(2)))
    gradients = device.LogitGradients(T, 5, None, 1.0, None, 1.0, numbers, numbers[:2])
    with pytest.raises(ValueError, match=r"^out: expected contiguous \[3, 5\], got \[5, 3\]$"):
        gradients.differentiate(torch.ones(3, 5), 0, 0, torch.ones(5, 3))


@pytest.mark.usefixtures("on_device")
def test_a_launch_that_fails(monkeypatch) -> None:
    case = tokens(3, 5, 40)
    monkeypatch.setenv("VHEAD_MOCK_FAIL", "cuLaunchKernel=719")
    with pytest.raises(CudaError, match=r"^vhead_token_statistics_fold was not launched: .*CUDA_ERROR_LAUNCH_FAILED"):
        case.run()
