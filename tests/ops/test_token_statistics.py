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
    statistics_in_chunks,
    statistics_of_logits,
    token_logprobs,
    token_statistics,
    token_statistics_plain,
)
from vhead.ops.matrix_unit import suits_matrix_unit
from vhead.ops.token_statistics import operator
from vhead.ops.token_statistics import twin as plain_torch
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
        for ours, twin in zip(given.run()[:4], given.run(token_statistics_plain)[:4], strict=True):
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
        operator.forward(case.hidden, case.weight, case.targets, None, 1.0, None, 1.0, False, None, 0)
    # The matrix unit's products are not even there as tiles that torch could see.
    by_unit = suits_matrix_unit(case.hidden, case.weight)
    assert largest.bytes <= 6 << 20
    assert by_unit or largest.bytes > 3 << 20
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
        logprobs, entropy = case.run(function, softcap=10.0)[:2]
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
    given, rule = (case.hidden, case.weight, case.targets), (0.7, 5.0, 1.0)
    torch.library.opcheck(OPERATOR, (*given, case.bias, *rule, False, None, 0))
    torch.library.opcheck(OPERATOR, (*given, None, 1.0, None, 1.0, True, None, 0))
    torch.library.opcheck(OPERATOR, (*given, case.bias, *rule, False, torch.randint(40, (6, 5)), 3))
    with torch.no_grad():
        _, entropy, _, _, peak, log_sum, *_ = OPERATOR(*given, case.bias, *rule, False, None, 0)
    saved = [t.detach() for t in (case.hidden, case.weight, case.targets, case.bias)]
    arguments = (torch.randn(6), torch.randn(6), *saved, peak, log_sum, entropy, *rule)
    for needed in ([True] * 3, [False, True, False]):
        torch.library.opcheck(BACKWARD_OPERATOR, (*arguments, needed))


def test_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(token_statistics, backend="aot_eager", fullgraph=True)
    case = tokens(10, 9, 40)
    for mine, eager in zip(case.run(compiled, temperature=0.7)[:4], case.run(temperature=0.7)[:4], strict=True):
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
        assert [t.shape for t in found[:4]] == [(6,)] * 4
        found.logprobs.sum().backward()
        assert fakes[1].grad.shape == (40, 9)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_logits_that_are_there(dtype) -> None:
    logits, targets = (torch.randn(40, 3000) * 4).to(dtype), torch.randint(3000, (40,))
    kept = logits.clone()
    ours = statistics_of_logits(logits, targets, temperature=0.7)
    exact = statistics_of_logits(logits.double(), targets, temperature=0.7)
    for mine, true in zip(ours[:4], exact[:4], strict=True):
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


def candidates_of(case: Tokens, count: int) -> Tensor:
    """Candidates of each row: its target, one token twice, the first and the last, and others."""
    rows, vocabulary = len(case.targets), len(case.weight)
    found = torch.randint(vocabulary, (rows, count))
    found[:, 0], found[:, 1], found[:, 2] = case.targets, 0, vocabulary - 1
    found[:, 4] = found[:, 3]
    return found


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates_and_the_likeliest_tokens_are_as_exact_as_the_twin(dtype, rule) -> None:
    case = tokens(60, 130, 3000, dtype)
    asked = {"candidates": candidates_of(case, 32), "top": 20}
    ours, plain = case.run(**rule, **asked), case.run(token_statistics_plain, **rule, **asked)
    exact = case.double().run(**rule, **asked)
    assert (ours.top_tokens.dtype, ours.top_tokens.shape) == (torch.int64, (60, 20))
    for mine, twin, true in zip(ours[4::2], plain[4::2], exact[4::2], strict=True):
        assert mine.dtype == torch.float32
        assert rms(mine - true) <= 2 * rms(twin - true) + 2e-7 * rms(true)
        assert rms(mine.roll(1, 1) - true) > 100 * rms(twin - true), "the check can fail"
    assert torch.equal(ours.top_tokens, exact.top_tokens)
    assert same_bits(ours.candidate_logprobs[:, 0], ours.logprobs)
    assert all(same_bits(a, b) for a, b in zip(ours[:3], case.run(**rule)[:3], strict=True)), "asking changes nothing"


def test_the_likeliest_tokens_are_those_of_a_sort() -> None:
    case = tokens(20, 30, 500)
    found = case.run(temperature=0.7, top=128)
    logp = torch.log_softmax((case.hidden @ case.weight.t() + case.bias) / 0.7, -1)
    largest, order = logp.sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(found.top_logprobs, largest[:, :128], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.top_tokens, order[:, :128])
    assert found.candidate_logprobs is None
    only = case.run(candidates=case.targets[:, None].int())
    assert same_bits(only.candidate_logprobs[:, 0], only.logprobs)
    assert only.top_tokens is only.top_logprobs is None


@pytest.mark.parametrize("function", [token_statistics, token_statistics_plain])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equally_likely_tokens_come_by_their_ids(function, dtype) -> None:
    hidden, weight = torch.tensor([[2.0], [-1.0]], dtype=dtype), torch.zeros(2100, 1, dtype=dtype)
    weight[[2099, 1500, 17, 16]] = 1.5
    found = function(hidden, weight, torch.tensor([16, 17]), top=6)
    assert found.top_tokens.tolist() == [[16, 17, 1500, 2099, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert found.is_top1.tolist() == [True, False]


@pytest.mark.parametrize("function", [token_statistics, token_statistics_plain])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_selected_tokens_of_a_row_that_is_not_finite(function, poison) -> None:
    case = tokens(20, 30, 1100)
    case.hidden[7, 3] = poison
    found = case.run(function, candidates=candidates_of(case, 5), top=3)
    for numbers in (found.candidate_logprobs, found.top_logprobs):
        assert numbers.isnan().any(1).nonzero().tolist() == [[7]]
        assert numbers[7].isnan().all()
    assert (found.top_tokens < 0).any(1).nonzero().tolist() == [[7]]
    assert found.top_tokens[7].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("function", [token_statistics, token_statistics_plain])
def test_selected_tokens_that_cannot_come(function) -> None:
    case = tokens(4, 30, 1100)
    case.bias[:] = -math.inf
    case.bias[[5, 1050]] = 0.0
    case.targets[:] = 5
    found = case.run(function, candidates=torch.tensor([[5, 3]] * 4), top=4)
    assert found.top_tokens[:, 2:].tolist() == [[0, 1]] * 4
    assert found.top_logprobs[:, 2:].isinf().all()
    torch.testing.assert_close(found.top_logprobs[:, :2].exp().sum(1), torch.ones(4))
    assert found.candidate_logprobs[:, 1].tolist() == [-math.inf] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("two_threads")
def test_batch_invariant_selections_do_not_depend_on_other_rows(dtype) -> None:
    case = tokens(70, 300, 2100, dtype)
    candidates = candidates_of(case, 6)
    together = case.run(batch_invariant=True, candidates=candidates, top=7)
    torch.set_num_threads(1)
    for rows in (slice(0, 1), slice(5, 40), slice(69, 70)):
        part = Tokens(case.hidden[rows], case.weight, case.targets[rows], case.bias)
        alone = part.run(batch_invariant=True, candidates=candidates[rows], top=7)
        assert same_bits(alone.candidate_logprobs, together.candidate_logprobs[rows])
        assert same_bits(alone.top_logprobs, together.top_logprobs[rows])
        assert torch.equal(alone.top_tokens, together.top_tokens[rows])


@pytest.mark.parametrize("size", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selections_of_small_sizes(size, dtype) -> None:
    weight = torch.randn(3, 5, dtype=dtype)
    hidden, targets = torch.randn(size, 5, dtype=dtype), torch.randint(3, (size,))
    for function in (token_statistics, token_statistics_plain):
        found = function(hidden, weight, targets, candidates=torch.empty(size, 0, dtype=torch.int64), top=3)
        assert [t.shape for t in found[4:]] == [(size, 0), (size, 3), (size, 3)]
        assert torch.equal(found.top_tokens.sort()[0], torch.arange(3).expand(size, 3))


def test_candidates_in_any_layout() -> None:
    case = tokens(20, 30, 1100)
    candidates = candidates_of(case, 8)
    expected = case.run(candidates=candidates).candidate_logprobs
    assert same_bits(case.run(candidates=candidates.t().contiguous().t()).candidate_logprobs, expected)
    assert same_bits(case.run(candidates=candidates[:, ::2]).candidate_logprobs, expected[:, ::2].contiguous())
    order = torch.randperm(8)
    assert same_bits(case.run(candidates=candidates[:, order]).candidate_logprobs, expected[:, order])
    one = case.run(candidates=candidates[:1].expand(20, -1)).candidate_logprobs
    assert same_bits(one[0], expected[0])


def test_selections_have_no_gradient_and_leave_the_others_theirs() -> None:
    case = tokens(10, 9, 40)
    every, candidates = gradients(case), candidates_of(case, 6)
    for function in (token_statistics, token_statistics_plain):
        leaves = case.leaves()
        found = leaves.run(function, candidates=candidates, top=3)
        assert not found.candidate_logprobs.requires_grad
        assert not found.top_logprobs.requires_grad
        upstream = [torch.linspace(-1, 2, 10), torch.linspace(3, -2, 10)]
        for mine, true in zip(torch.autograd.grad(found[:2], leaves.parameters, upstream), every, strict=True):
            torch.testing.assert_close(mine, true)
    logits = torch.randn(4, 30, requires_grad=True)
    found = statistics_of_logits(logits, torch.zeros(4, dtype=torch.int64), candidates=torch.ones(4, 2).long(), top=2)
    assert found.logprobs.requires_grad
    assert not found.candidate_logprobs.requires_grad
    assert not found.top_logprobs.requires_grad


def test_selections_under_compile_and_fake_tensors() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(token_statistics, backend="aot_eager", fullgraph=True)
    case = tokens(10, 9, 40)
    candidates = candidates_of(case, 5)
    for mine, eager in zip(
        *(case.run(f, candidates=candidates, top=3) for f in (compiled, token_statistics)), strict=True
    ):
        torch.testing.assert_close(mine, eager)
    with FakeTensorMode():
        fakes = [torch.randn(6, 9), torch.randn(40, 9), torch.zeros(6, dtype=torch.int64)]
        found = token_statistics(*fakes, candidates=torch.zeros(6, 2, dtype=torch.int64), top=3)
        assert [(t.shape, t.dtype) for t in found[4:]] == [
            ((6, 2), torch.float32),
            ((6, 3), torch.int64),
            ((6, 3), torch.float32),
        ]


def test_selections_under_transforms() -> None:
    case = tokens(10, 9, 40)
    candidates = candidates_of(case, 5)

    def of_row(hidden: Tensor, target: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        found = token_statistics(
            hidden[None], case.weight, target[None], bias=case.bias, candidates=tokens[None], top=3
        )
        return tuple(t[0] for t in found)

    for mine, eager in zip(
        vmap(of_row)(case.hidden, case.targets, candidates), case.run(candidates=candidates, top=3), strict=True
    ):
        torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_selections_of_logits_that_are_there(dtype, monkeypatch) -> None:
    logits, targets = (torch.randn(40, 3000) * 4).to(dtype), torch.randint(3000, (40,))
    candidates = torch.cat((targets[:, None], torch.randint(3000, (40, 5))), 1)
    asked = {"temperature": 0.7, "top": 6}
    ours = statistics_of_logits(logits, targets, candidates=candidates, **asked)
    logp = torch.log_softmax(logits.double() / 0.7, -1)
    torch.testing.assert_close(ours.candidate_logprobs.double(), logp.gather(1, candidates), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.top_logprobs.double(), logp.topk(6).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.top_logprobs, logp.gather(1, ours.top_tokens).to(ours.top_logprobs.dtype))
    monkeypatch.setattr(plain_torch, "_LOGITS_BYTES", 4 * 3000 * 7)
    chunked = statistics_in_chunks(lambda rows: logits[rows], targets, 3000, candidates=candidates, **asked)
    for mine, whole in zip(chunked, ours, strict=True):
        torch.testing.assert_close(mine, whole)
    assert statistics_in_chunks(lambda rows: logits[rows], targets, 3000).candidate_logprobs is None
    with pytest.raises(ValueError, match=r"^candidates: expected \[40, M\], got \[41, 6\]$"):
        statistics_in_chunks(lambda rows: logits[rows], targets, 3000, candidates=candidates[[*range(40), 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_selection_never_holds_the_logits(dtype) -> None:
    case = tokens(1280, 8, 4000, dtype, bias=False)
    with Largest() as largest:
        operator.forward(
            case.hidden, case.weight, case.targets, None, 1.0, None, 1.0, False, candidates_of(case, 32), 8
        )
    assert largest.bytes <= 6 << 20


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
C = torch.zeros(3, 2, dtype=torch.int64)
WRONG_SELECTIONS = [
    ({"candidates": [[0]] * 3}, TypeError, "candidates: expected a torch.Tensor, got list"),
    ({"candidates": C.float()}, TypeError, "candidates: expected int64 or int32, got float32"),
    ({"candidates": C[:, 0]}, ValueError, "candidates: expected [3, M], got [3]"),
    ({"candidates": C[:2]}, ValueError, "candidates: expected [3, M], got [2, 2]"),
    ({"candidates": C.to("meta")}, ValueError, "candidates: expected a tensor on cpu like hidden, got one on meta"),
    ({"candidates": C + 5}, ValueError, "candidates: expected token ids below 5, got 5 in row 0"),
    ({"candidates": C - T[:, None]}, ValueError, "candidates: expected token ids below 5, got -4 in row 1"),
    ({"top": -1}, ValueError, "top: expected at least 0 and at most 5, got -1"),
    ({"top": 6}, ValueError, "top: expected at least 0 and at most 5, got 6"),
    ({"top": 2.0}, TypeError, "top: expected an int, got float"),
    ({"top": True}, TypeError, "top: expected an int, got bool"),
]


@pytest.mark.parametrize(("keywords", "error", "message"), WRONG_SELECTIONS, ids=[row[2] for row in WRONG_SELECTIONS])
def test_wrong_selections(keywords, error, message) -> None:
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(error) as caught:
            token_statistics(H.to(dtype), W.to(dtype), T, **keywords)
        assert str(caught.value) == message


def test_more_than_128_likeliest_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^top: expected at least 0 and at most 128, got 129$"):
        token_statistics(H, torch.ones(500, 8), T, top=129)


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
