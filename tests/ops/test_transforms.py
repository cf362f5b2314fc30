"""Everything of torch's that watches, traces or transforms the operation."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils import checkpoint as checkpointing
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.conftest import Case, same_bits
from vhead.ops import value_head, value_head_plain

OPERATOR = torch.ops.vhead.value_head.default
BACKWARD_OPERATOR = torch.ops.vhead.value_head_backward.default


class Head(nn.Module):
    def __init__(self, columns: int, p: float = 0.0) -> None:
        super().__init__()
        self.summary, self.p = nn.Linear(columns, 1), p

    def forward(self, hidden: Tensor) -> Tensor:
        return value_head(hidden, self.summary.weight, self.summary.bias, dropout_p=self.p)


class Recorder(TorchDispatchMode):
    """Notes each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


# opcheck itself looks at `.grad` of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("dtype", "outputs"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_opcheck(case, dtype, outputs) -> None:
    c = case(3, 5, 37, outputs=outputs, dtype=dtype).leaves()
    torch.library.opcheck(OPERATOR, (*c.tensors, 0.3, torch.tensor(5)))
    torch.library.opcheck(OPERATOR, (c.hidden, c.weight, None, 0.0, None))
    upstream = torch.randn(OPERATOR(*c.tensors, 0.0, None).shape)
    arguments = (upstream, c.hidden.detach(), c.weight.detach(), 0.3, torch.tensor(5))
    for needed in ([True, True, True], [False, True, False]):
        torch.library.opcheck(BACKWARD_OPERATOR, (*arguments, needed))


def graphs_of(function, *arguments: Tensor) -> list[list[object]]:
    """What `torch.compile` leaves in the forward and backward graphs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[list[object]] = []

    def keep(module, _examples):
        graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return make_boxed_func(module)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(function, backend=backend, fullgraph=True)(*arguments).sum().backward()
    return graphs


def test_compiled_graphs_hold_the_operators(case) -> None:
    c = case(3, 37).leaves()
    forward, backward = graphs_of(lambda h, w, b: value_head(h, w, b, dropout_p=0.3), *c.tensors)
    assert OPERATOR in forward
    assert BACKWARD_OPERATOR in backward
    assert not any("mul" in str(target) or "mm" in str(target) for target in forward + backward)


@pytest.fixture
def subnormal_numbers() -> Iterator[None]:
    """Restores them: older compilers link `-ffast-math` kernels so that loading one flushes subnormals from then on."""
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("subnormal_numbers")
@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", True), ("aot_eager", None), pytest.param("inductor", True, marks=pytest.mark.slow)],
)
def test_compile(case, backend, dynamic) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: value_head(*tensors, dropout_p=0.3, seed=9).sin(),
        backend=backend,
        fullgraph=True,
        dynamic=dynamic,
    )
    for rows in (4, 6):
        c = case(rows, 5, 37, dtype=torch.bfloat16)
        c.weight = c.weight.half()
        ours, eager = c.leaves(), c.leaves()
        values, expected = compiled(*ours.tensors), value_head(*eager.tensors, dropout_p=0.3, seed=9).sin()
        torch.testing.assert_close(values, expected)
        values.sum().backward()
        expected.sum().backward()
        for a, b in zip(ours.gradients(), eager.gradients(), strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_code_draws_the_seeds_that_eager_code_draws(case) -> None:
    c = case(6, 37)
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w: value_head(h, w, dropout_p=0.5), backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    first, second = compiled(c.hidden, c.weight), compiled(c.hidden, c.weight)
    torch.manual_seed(1)
    assert same_bits(first, value_head(c.hidden, c.weight, dropout_p=0.5))
    assert not same_bits(first, second)


def test_compile_float64(case) -> None:
    c = case(6, 37).double()
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w: value_head(h, w, dropout_p=0.5, seed=3), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(c.hidden, c.weight), value_head(c.hidden, c.weight, dropout_p=0.5, seed=3))


@pytest.mark.parametrize("strict", [True, False])
def test_export(case, strict) -> None:
    head, hidden = Head(37), case(4, 5, 37).hidden
    shapes = ({0: torch.export.Dim("batch", min=2, max=100)},)
    program = torch.export.export(head, (hidden,), strict=strict, dynamic_shapes=shapes)
    assert OPERATOR in [node.target for node in program.graph.nodes]
    longer = case(9, 5, 37).hidden
    assert same_bits(program.module()(longer), head(longer))


@pytest.mark.filterwarnings("ignore")
def test_tracing_records_the_operator(case) -> None:
    c = case(4, 37)
    traced = torch.jit.trace(lambda h: value_head(h, c.weight, c.bias), (c.hidden,), check_trace=False)
    other = case(4, 37).hidden
    assert same_bits(traced(other), value_head(other, c.weight, c.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_head_in_float32(case, dtype) -> None:
    for p, c in [(0.0, case(3, 300)), (0.4, case(3, 300).leaves()), (0.0, case(3, 300).double())]:
        with torch.autocast("cpu", dtype=dtype):
            assert torch.mm(c.hidden.float(), c.hidden.float().t()).dtype == dtype, "the check can fail"
            ours, plain = (f(*c.tensors, dropout_p=p, seed=1) for f in (value_head, value_head_plain))
        assert ours.dtype == plain.dtype == (torch.float64 if c.hidden.dtype == torch.float64 else torch.float32)
        assert torch.equal(ours, value_head(*c.tensors, dropout_p=p, seed=1))
        assert torch.equal(plain, value_head_plain(*c.tensors, dropout_p=p, seed=1))


def loop(function, *batches: Tensor) -> Tensor:
    return torch.stack([function(*samples) for samples in zip(*batches, strict=True)])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_vmap_is_the_loop(case, p) -> None:
    c = case(4, 6, 37)
    weights, biases, seeds = torch.randn(4, 1, 37), torch.randn(4, 1), torch.arange(4)
    head = partial(value_head, dropout_p=p, seed=3)
    over_hidden = partial(head, weight=c.weight, bias=c.bias)
    assert same_bits(vmap(over_hidden)(c.hidden), loop(over_hidden, c.hidden))
    inner = vmap(over_hidden, in_dims=1)(c.hidden)
    assert same_bits(inner, loop(over_hidden, c.hidden.transpose(0, 1)))
    assert same_bits(vmap(head)(c.hidden, weights, biases), loop(head, c.hidden, weights, biases))
    one = partial(head, c.hidden[0])
    assert same_bits(vmap(one)(weights), loop(one, weights))

    def seeded(hidden, seed):
        return value_head(hidden, c.weight, dropout_p=p, seed=seed)

    assert same_bits(vmap(seeded)(c.hidden, seeds), loop(seeded, c.hidden, seeds))
    assert same_bits(vmap(vmap(over_hidden))(c.hidden), loop(partial(loop, over_hidden), c.hidden))


def test_vmap_draws_seeds_as_torch_s_randomness_says(case) -> None:
    c = case(1, 6, 37)
    same = c.hidden.expand(3, 6, 37)

    def head(hidden):
        return value_head(hidden, c.weight, dropout_p=0.5)

    different = vmap(head, randomness="different")(same)
    assert not same_bits(different[0], different[1])
    equal = vmap(head, randomness="same")(same)
    assert same_bits(equal[0], equal[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(head)(same)


# torch's own jvp compiles its decompositions with the deprecated torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_functional_gradients(case, p) -> None:
    c = case(4, 6, 37)

    def loss(head, weight, hidden):
        return head(hidden, weight, c.bias, dropout_p=p, seed=3).sin().sum()

    for differentiate in (
        lambda f: grad(f)(c.weight, c.hidden),
        lambda f: vmap(grad(f), in_dims=(None, 0))(c.weight, c.hidden),
        lambda f: jacrev(f)(c.weight, c.hidden),
        lambda f: jacfwd(f)(c.weight, c.hidden),
        lambda f: grad(lambda w: grad(f)(w, c.hidden).square().sum())(c.weight),
        lambda f: jvp(lambda w: f(w, c.hidden), (c.weight,), (c.weight.cos(),))[1],
    ):
        ours, plain = differentiate(partial(loss, value_head)), differentiate(partial(loss, value_head_plain))
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
def test_forward_mode_keeps_its_tangents(case) -> None:
    c = case(4, 37)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(c.hidden, torch.ones_like(c.hidden))
        tangent = forward_ad.unpack_dual(value_head(dual, c.weight)).tangent
    torch.testing.assert_close(tangent, c.weight.sum().expand(4))


def test_fake_and_meta_tensors_have_shapes(case) -> None:
    c = case(2, 3, 37, outputs=4)
    with FakeTensorMode():
        fakes = [torch.randn(t.shape, requires_grad=True) for t in c.tensors]
        values = value_head(*fakes, dropout_p=0.3)
        assert isinstance(values, FakeTensor)
        assert values.shape == (2, 3, 4)
        assert values.dtype == torch.float32
        values.sum().backward()
        assert fakes[0].grad.shape == (2, 3, 37)
    outside = value_head(*(t.detach() for t in fakes))
    assert isinstance(outside, FakeTensor)
    assert outside.shape == (2, 3, 4)
    metas = [t.to("meta").requires_grad_() for t in c.tensors]
    for p in (0.0, 0.3):
        values = value_head(*metas, dropout_p=p)
        assert values.is_meta
        assert values.shape == (2, 3, 4)
        assert values.dtype == torch.float32
        values.sum().backward()
        assert metas[1].grad.shape == (4, 37)


def test_dispatch_modes_see_the_operators(case) -> None:
    c = case(3, 37)
    with Recorder() as recorder:
        values = value_head(*c.tensors)
    assert recorder.seen == [OPERATOR]
    assert same_bits(values, value_head(*c.tensors))
    leaves = c.leaves()
    with Recorder() as recorder:
        value_head(*leaves.tensors).sum().backward()
    assert OPERATOR in recorder.seen
    assert BACKWARD_OPERATOR in recorder.seen


@pytest.mark.skipif(not hasattr(checkpointing, "CheckpointPolicy"), reason="torch >= 2.5")
def test_selective_checkpointing_sees_the_operator(case) -> None:
    c, seen = case(5, 37), []

    def policy(_ctx, operator, *_args, **_kwargs):
        seen.append(operator)
        decision = checkpointing.CheckpointPolicy
        return decision.MUST_SAVE if operator == OPERATOR else decision.PREFER_RECOMPUTE

    def run(**arguments) -> Case:
        torch.manual_seed(2)
        leaves = c.leaves()
        layer = partial(value_head, weight=leaves.weight, bias=leaves.bias, dropout_p=0.4)
        recomputed = partial(checkpointing.checkpoint, layer, use_reentrant=False, **arguments)
        values = (recomputed if arguments else layer)(leaves.hidden)
        values.sin().sum().backward()
        return leaves

    selective = run(context_fn=partial(checkpointing.create_selective_checkpoint_contexts, policy))
    assert OPERATOR in seen
    for a, b in zip(selective.gradients(), run().gradients(), strict=True):
        assert same_bits(a, b)


class Wrapped(Tensor):
    """A subclass that holds its data elsewhere: its own storage is empty."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(Tensor, Wrapped, func(*plain[0], **plain[1]))


class Named(Tensor):
    """A subclass with data of its own."""


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_subclasses_are_never_read_by_their_pointer(case, p) -> None:
    c = case(3, 37)
    expected = value_head_plain(*c.tensors, dropout_p=p, seed=1)
    for hidden, weight in [(Wrapped(c.hidden), c.weight), (c.hidden, Wrapped(c.weight))]:
        values = value_head(hidden, weight, c.bias, dropout_p=p, seed=1)
        assert isinstance(values, Wrapped)
        assert torch.equal(values.inner, expected)
    named = value_head(c.hidden.as_subclass(Named), c.weight, c.bias, dropout_p=p, seed=1)
    assert isinstance(named, Named)
    torch.testing.assert_close(named.as_subclass(Tensor), expected)
