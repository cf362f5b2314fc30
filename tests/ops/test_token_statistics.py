"""Token statistics: against float64, across batches, their gradients, and what torch does with them."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.conftest import DTYPES, HALVES, rms, same_bits
from vhead import _native
from vhead.ops import (
    TokenStatistics,
    statistics_of_logits,
    token_logprobs,
    token_statistics,
    token_statistics_plain,
)
from vhead.ops.token_statistics import operator
from vhead.ops.token_statistics.cpu import CpuTiling

OPERATOR = torch.ops.vhead.token_statistics.default
BACKWARD_OPERATOR = torch.ops.vhead.token_statistics_backward.default
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scaled": {"scale": 0.0625, "temperature": 1.5},
    "capped": {"softcap": 5.0, "scale": 1.5, "temperature": 0.8},
}


@dataclass
class Tokens:
    """Arguments of `token_statistics`, random."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None

    def run(self, function=token_statistics, **arguments) -> TokenStatistics:
        return function(self.hidden, self.weight, self.targets, bias=self.bias, **arguments)

    def double(self) -> "Tokens":
        bias = None if self.bias is None else self.bias.double()
        return Tokens(self.hidden.double(), self.weight.double(), self.targets, bias)

    def leaves(self) -> "Tokens":
        hidden, weight, bias = (
            t if t is None else t.detach().clone().requires_grad_() for t in (self.hidden, self.weight, self.bias)
        )
        return Tokens(hidden, weight, self.targets, bias)

    @property
    def parameters(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]


def tokens(rows: int, columns: int, vocabulary: int, dtype=torch.float32, *, bias: bool = True) -> Tokens:
    """Logits of a standard deviation of 3."""
    weight = (torch.randn(vocabulary, columns) * 3 / columns**0.5).to(dtype)
    hidden, targets = torch.randn(rows, columns).to(dtype), torch.randint(vocabulary, (rows,))
    return Tokens(hidden, weight, targets, torch.randn(vocabulary).to(dtype) if bias else None)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_as_exact_as_the_twin(dtype, rule, bias) -> None:
    case = tokens(60, 130, 3000, dtype, bias=bias)
    ours, plain, exact = case.run(**rule), case.run(token_statistics_plain, **rule), case.double().run(**rule)
    for mine, twin, true in zip(ours[:3], plain[:3], exact[:3], strict=True):
        assert mine.dtype == torch.float32
        assert rms(mine - true) <= 1.1 * rms(twin - true) + 3e-8 * rms(true)
    assert torch.equal(ours.is_top1, exact.is_top1)
    other = case.run(**{**rule, "temperature": 1.01 * rule.get("temperature", 1.0)})
    assert rms(other.logprobs - exact.logprobs) > 100 * rms(plain.logprobs - exact.logprobs), "the check can fail"


def test_the_formulas() -> None:
    case = tokens(20, 30, 500)
    found = case.run(temperature=0.7)
    logp = torch.log_softmax((case.hidden.double() @ case.weight.double().t() + case.bias.double()) / 0.7, -1)
    p = logp.exp()
    expected = (
        logp[torch.arange(20), case.targets],
        torch.distributions.Categorical(logits=logp).entropy(),
        p.square().sum(-1).log(),
    )
    for ours, true in zip(found, expected, strict=False):
        torch.testing.assert_close(ours, true.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.is_top1, p.argmax(-1) == case.targets)
    best = replace(case, targets=p.argmax(-1)).run(temperature=0.7)
    assert best.is_top1.all()
    assert all(same_bits(a, b) for a, b in zip(case.run()[:2], case.run(token_logprobs), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("two_threads")
def test_batch_invariant_rows_do_not_depend_on_each_other(dtype) -> None:
    case = tokens(70, 300, 2100, dtype)
    together = case.run(batch_invariant=True, softcap=20.0)
    torch.set_num_threads(1)
    for rows in (slice(0, 1), slice(13, 14), slice(5, 40), slice(69, 70)):
        part = Tokens(case.hidden[rows], case.weight, case.targets[rows], case.bias)
        alone = part.run(batch_invariant=True, softcap=20.0)
        assert all(same_bits(a, b[rows]) for a, b in zip(alone[:3], together[:3], strict=True))
    assert not all(same_bits(a, b) for a, b in zip(case.run(softcap=20.0)[:3], together[:3], strict=True)), (
        "torch's own products differ, so the check can fail"
    )


@pytest.mark.usefixtures("two_threads")
def test_the_same_call_gives_the_same_bits() -> None:
    case = tokens(70, 300, 2100)
    first = case.run()
    assert all(same_bits(a, b) for a, b in zip(first[:3], case.run()[:3], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_rows_change_nothing(dtype, monkeypatch) -> None:
    case = tokens(50, 40, 1500, dtype)
    whole, exact = case.run(batch_invariant=True), case.double().run()
    monkeypatch.setattr(CpuTiling, "ROWS", 16)
    monkeypatch.setattr(CpuTiling, "UPCAST_BYTES", 4 * 40 * 21)
    assert all(same_bits(a, b) for a, b in zip(case.run(batch_invariant=True)[:3], whole[:3], strict=True))
    torch.testing.assert_close(case.run().logprobs, exact.logprobs.float(), rtol=1e-5, atol=1e-5)


def test_strides_and_views_do_not_matter() -> None:
    case = tokens(20, 30, 1100)
    expected = case.run(batch_invariant=True)
    hidden = torch.randn(40, 60)
    hidden[::2, ::2] = case.hidden
    weight = case.weight.t().contiguous().t()
    assert not weight.is_contiguous()
    strided = Tokens(hidden[::2, ::2], weight, case.targets.repeat_interleave(2)[::2], case.bias)
    assert all(same_bits(a, b) for a, b in zip(strided.run(batch_invariant=True)[:3], expected[:3], strict=True))
    torch.testing.assert_close(strided.run().logprobs, expected.logprobs)
    negative = torch.randn(20, 30, dtype=torch.complex64).conj().imag
    torch.testing.assert_close(
        replace(case, hidden=negative).run().logprobs, replace(case, hidden=negative.clone()).run().logprobs
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_infinity_reach_their_row_only(poison) -> None:
    case = tokens(20, 30, 1100)
    case.hidden[7, 3] = poison
    for function in (token_statistics, token_statistics_plain):
        found = case.run(function)
        assert [t.isnan().nonzero().tolist() for t in found[:3]] == [[[7]]] * 3
        assert not found.is_top1[7]


def test_tokens_that_cannot_come() -> None:
    case = tokens(20, 30, 1100)
    case.bias[:600] = -math.inf
    case.targets[:] = torch.arange(20) + 590
    ours, exact = case.run(), case.double().run(token_statistics_plain)
    assert torch.equal(ours.logprobs.isinf(), torch.arange(20) < 10)
    torch.testing.assert_close(ours.logprobs[10:], exact.logprobs[10:].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy, exact.entropy.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 7), (1, 1), (3, 2)])
def test_small_sizes(rows, vocabulary) -> None:
    case = tokens(rows, 5, vocabulary)
    for dtype in (torch.float32, torch.float64):
        given = case if dtype == torch.float32 else case.double()
        for ours, twin in zip(given.run(), given.run(token_statistics_plain), strict=True):
            assert ours.shape == (rows,)
            torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-6)
    assert same_bits(case.run().logprobs, replace(case, targets=case.targets.int()).run().logprobs)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_there(dtype) -> None:
    case = tokens(1280, 8, 4000, dtype, bias=False)
    with Largest() as largest:  # inside the operator, which a dispatch mode does not look into
        operator.forward(case.hidden, case.weight, case.targets, None, 1.0, None, 1.0, False)
    assert 3 << 20 < largest.bytes <= 6 << 20
    with Largest() as largest:
        case.run(token_statistics_plain)
    assert largest.bytes >= 1280 * 4000 * 4, "the check can fail"


def gradients(case: Tokens, function=token_statistics, **rule) -> list[Tensor]:
    case = case.leaves()
    found = case.run(function, **rule)
    upstream = [torch.linspace(-1, 2, len(case.hidden)), torch.linspace(3, -2, len(case.hidden))]
    return list(torch.autograd.grad(found[:2], case.parameters, [u.to(found.entropy.dtype) for u in upstream]))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_as_exact_as_the_twin_s(dtype, rule, monkeypatch) -> None:
    monkeypatch.setattr(CpuTiling, "ROWS", 16)
    case = tokens(50, 40, 1500, dtype)
    ours, plain = gradients(case, **rule), gradients(case, token_statistics_plain, **rule)
    exact = gradients(case.double(), token_statistics_plain, **rule)
    wrong = gradients(replace(case, targets=case.targets.roll(1)), **rule)
    for mine, twin, true, other in zip(ours, plain, exact, wrong, strict=True):
        assert mine.dtype == twin.dtype
        assert mine.shape == true.shape
        assert rms(mine - true) <= 1.5 * rms(twin - true) + 1e-6 * rms(true)
        assert rms(other - true) > 1e-2 * rms(true), "the check can fail"


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradients_by_finite_differences(rule) -> None:
    case = tokens(3, 4, 7).double().leaves()

    def function(hidden, weight, bias):
        return token_logprobs(hidden, weight, case.targets, bias=bias, **rule)

    assert torch.autograd.gradcheck(function, case.parameters)
    assert torch.autograd.gradgradcheck(function, case.parameters)


def test_double_backward_is_the_twin_s() -> None:
    def twice(case: Tokens, function) -> list[Tensor]:
        case = case.leaves()
        logprobs, entropy, _, _ = case.run(function, softcap=10.0)
        first = torch.autograd.grad((logprobs.sin() + entropy).sum(), case.parameters, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return [t.grad for t in case.parameters]

    case = tokens(6, 9, 40)
    for mine, true in zip(twice(case, token_statistics), twice(case.double(), token_statistics_plain), strict=True):
        torch.testing.assert_close(mine, true.float(), rtol=1e-3, atol=1e-4)


def test_only_what_is_needed_is_computed() -> None:
    case = tokens(10, 9, 40)
    every = gradients(case)
    for missing in range(3):
        leaves = case.leaves()
        leaves.parameters[missing].requires_grad_(requires_grad=False)
        found = leaves.run()
        assert not found.log_sum_p_squared.requires_grad
        (found.logprobs @ torch.linspace(-1, 2, 10) + found.entropy @ torch.linspace(3, -2, 10)).backward()
        for i, (leaf, full) in enumerate(zip(leaves.parameters, every, strict=True)):
            assert leaf.grad is None if i == missing else same_bits(leaf.grad, full)
    frozen = case.leaves()
    frozen.run().entropy.sum().backward()
    assert frozen.hidden.grad is not None


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_changes_nothing(dtype) -> None:
    case = tokens(20, 60, 1100)
    expected, of = case.run(), gradients(case)
    with torch.autocast("cpu", dtype=dtype):
        inside, plain, of_inside = case.run(), case.run(token_statistics_plain), gradients(case)
    assert same_bits(inside.logprobs, expected.logprobs)
    assert same_bits(plain.logprobs, case.run(token_statistics_plain).logprobs)
    assert all(same_bits(a, b) for a, b in zip(of, of_inside, strict=True))


# opcheck itself looks at `.grad` of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype) -> None:
    case = tokens(6, 9, 40, dtype).leaves()
    torch.library.opcheck(OPERATOR, (case.hidden, case.weight, case.targets, case.bias, 0.7, 5.0, 1.0, False))
    torch.library.opcheck(OPERATOR, (case.hidden, case.weight, case.targets, None, 1.0, None, 1.0, True))
    with torch.no_grad():
        _, entropy, _, _, peak, log_sum = OPERATOR(
            case.hidden, case.weight, case.targets, case.bias, 0.7, 5.0, 1.0, False
        )
    saved = [t.detach() for t in (case.hidden, case.weight, case.targets, case.bias)]
    arguments = (torch.randn(6), torch.randn(6), *saved, peak, log_sum, entropy, 0.7, 5.0, 1.0)
    for needed in ([True] * 3, [False, True, False]):
        torch.library.opcheck(BACKWARD_OPERATOR, (*arguments, needed))


def test_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(token_statistics, backend="aot_eager", fullgraph=True)
    case = tokens(10, 9, 40)
    for mine, eager in zip(case.run(compiled, temperature=0.7), case.run(temperature=0.7), strict=True):
        torch.testing.assert_close(mine, eager)
    for mine, eager in zip(gradients(case, compiled), gradients(case), strict=True):
        torch.testing.assert_close(mine, eager)


def test_transforms_take_the_twin() -> None:
    case = tokens(10, 9, 40)

    def logprob(hidden: Tensor, target: Tensor) -> Tensor:
        return token_logprobs(hidden[None], case.weight, target[None], bias=case.bias)[0][0]

    torch.testing.assert_close(vmap(logprob)(case.hidden, case.targets), case.run().logprobs)
    one = case.leaves()
    one.run().logprobs.sum().backward()
    torch.testing.assert_close(vmap(grad(logprob))(case.hidden, case.targets), one.hidden.grad)


def test_fake_and_meta_tensors_have_shapes() -> None:
    with FakeTensorMode():
        fakes = [torch.randn(6, 9, requires_grad=True), torch.randn(40, 9, requires_grad=True)]
        found = token_statistics(*fakes, torch.zeros(6, dtype=torch.int64))
        assert [t.shape for t in found] == [(6,)] * 4
        found.logprobs.sum().backward()
        assert fakes[1].grad.shape == (40, 9)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_logits_that_are_there(dtype) -> None:
    logits, targets = (torch.randn(40, 3000) * 4).to(dtype), torch.randint(3000, (40,))
    kept = logits.clone()
    ours = statistics_of_logits(logits, targets, temperature=0.7)
    exact = statistics_of_logits(logits.double(), targets, temperature=0.7)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true if mine.dtype == torch.bool else true.to(mine.dtype))
    assert same_bits(logits.view(-1).float(), kept.view(-1).float())
    view = statistics_of_logits(logits.t().contiguous().t()[::2], targets[::2].int(), temperature=0.7)
    torch.testing.assert_close(view.entropy, ours.entropy[::2])
    assert not torch.allclose(statistics_of_logits(logits, targets).entropy, ours.entropy)


def test_logits_that_need_a_gradient() -> None:
    logits, targets = torch.randn(4, 30, requires_grad=True), torch.randint(30, (4,))
    statistics_of_logits(logits, targets).logprobs.sum().backward()
    expected = torch.nn.functional.one_hot(targets, 30) - logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, expected)
    with pytest.raises(ValueError, match=r"^logits: expected \[N, V\] with V >= 1, got \[30\]$"):
        statistics_of_logits(logits[0], targets)
    with pytest.raises(ValueError, match=r"^targets: expected token ids below 30, got 30 in row 0$"):
        statistics_of_logits(logits.detach(), targets * 0 + 30)


H, W, T = torch.ones(3, 8), torch.ones(5, 8), torch.tensor([0, 4, 2])
WRONG = [
    ((0, W, T), {}, TypeError, "hidden: expected a torch.Tensor, got int"),
    ((H[0], W, T), {}, ValueError, "hidden: expected [N, H] with H >= 1, got [8]"),
    ((H, W.int(), T), {}, TypeError, "lm_head_weight: expected float32, bfloat16, float16 or float64, got int32"),
    ((H, W.t(), T), {}, ValueError, "lm_head_weight: expected [V, 8], got [8, 5]"),
    ((H, W.to("meta"), T), {}, ValueError, "lm_head_weight: expected a tensor on cpu like hidden, got one on meta"),
    ((H, W, [0, 4, 2]), {}, TypeError, "targets: expected a torch.Tensor, got list"),
    ((H, W, T.float()), {}, TypeError, "targets: expected int64 or int32, got float32"),
    ((H, W, T[:2]), {}, ValueError, "targets: expected [3], got [2]"),
    ((H, W, torch.tensor([0, 4, 5])), {}, ValueError, "targets: expected token ids below 5, got 5 in row 2"),
    ((H, W, torch.tensor([0, -100, 5])), {}, ValueError, "targets: expected token ids below 5, got -100 in row 1"),
    ((H, W, T), {"bias": torch.ones(3)}, ValueError, "bias: expected [5], got [3]"),
    ((H, W, T), {"temperature": 0.0}, ValueError, "temperature: expected a finite number above zero, got 0.0"),
    ((H, W, T), {"softcap": -1.0}, ValueError, "softcap: expected a finite number above zero, got -1.0"),
    ((H, W, T), {"scale": math.inf}, ValueError, "scale: expected a finite number, got inf"),
]


@pytest.mark.parametrize(("arguments", "keywords", "error", "message"), WRONG, ids=[row[3] for row in WRONG])
def test_wrong_arguments(arguments, keywords, error, message) -> None:
    with pytest.raises(error) as caught:
        token_logprobs(*arguments, **keywords)
    assert str(caught.value) == message
    if message.startswith("targets: expected token ids"):
        with pytest.raises(error) as caught:
            token_logprobs(arguments[0].double(), arguments[1].double(), arguments[2])
        assert str(caught.value) == message


def test_batch_invariant_float64_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^batch_invariant: expected float32, bfloat16 or float16 on cpu, got float64"
    ):
        token_logprobs(H.double(), W.double(), T, batch_invariant=True)


def test_batch_invariance_is_refused_where_it_cannot_be_had() -> None:
    with pytest.raises(
        ValueError, match=r"^batch_invariant: expected float32, bfloat16 or float16 on cpu, got bfloat16 on meta$"
    ):
        token_logprobs(H.bfloat16().to("meta"), W.bfloat16().to("meta"), T.to("meta"), batch_invariant=True)


def test_the_kernels_check_their_tiles() -> None:
    found = _native.LogitStatistics(T, 5, None, 1.0, None, 1.0)
    with pytest.raises(ValueError, match=r"^rows: expected 2 elements, got 3$"):
        found.fold(torch.ones(3, 5), 1, 0)
    with pytest.raises(TypeError, match=r"^products: expected float32, got float64$"):
        found.fold(torch.ones(3, 5).double(), 0, 0)
    numbers = (torch.ones(3),) * 3
    gradients = _native.LogitGradients(T, 5, None, 1.0, None, 1.0, numbers, numbers[:2])
    with pytest.raises(ValueError, match=r"^products: expected a contiguous float32 tensor$"):
        gradients.differentiate(torch.ones(5, 3).t(), 0, 0)
    with pytest.raises(ValueError, match=r"^out: expected \[3, 5\], got \[5, 3\]$"):
        _native.linear(H, W, None, 1.0, relu=False, out=torch.ones(5, 3))
