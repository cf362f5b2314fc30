"""Two gloo processes train the whole model with DDP and FSDP2, and save it. One spawn runs every check."""

import copy
import tempfile

import pytest
import torch
import torch.distributed.fsdp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests.trainers.toy_task import language_model
from tests.two_processes import RANKS, outcomes_of
from vhead import AutoModelForCausalLMWithValueHead

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class RawNames(AutoModelForCausalLMWithValueHead):
    """The same model with the module's own names in its state dict, as docs/trainers.md shows it."""

    state_dict = torch.nn.Module.state_dict


def whole(wrapper=AutoModelForCausalLMWithValueHead):
    """Untied: `fully_shard` on a body and its embeddings apart would shard a tied weight twice."""
    torch.manual_seed(0)
    return wrapper(language_model(tied=False), summary_dropout_prob=0.0)


def sharded(wrapper=AutoModelForCausalLMWithValueHead):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = whole(wrapper)
    for layer in model.pretrained_model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    for name in ("values", "generate"):
        register_fsdp_forward_method(model, name)
    return model


def tokens(rank=None):
    both = torch.randint(3, 259, (2 * RANKS, 6), generator=torch.Generator().manual_seed(1))
    return both if rank is None else both[2 * rank : 2 * rank + 2]


def loss_of(model, ids):
    logits, loss, values = model(ids, labels=ids)
    return loss + (values - 1).square().mean() + logits.logsumexp(-1).mean()


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model, optimizer, ids):
    loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()


def full(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def assert_same_weights(a, b, **tolerance):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.keys() == b.keys()
    for name, weight in a.items():
        torch.testing.assert_close(full(weight), full(b[name]), msg=name, **tolerance)


def trained_alone():
    """What both processes together must arrive at: equal shares of the batch make the mean of the means the mean."""
    model = whole()
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(model, optimizer, tokens())
    return model


def check_ddp(rank):
    model = whole()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(parallel, optimizer, tokens(rank))
    assert_same_weights(model, trained_alone(), rtol=1e-3, atol=2e-4)
    other = whole()
    other.load_state_dict(parallel.state_dict())
    assert_same_weights(model, other)


def check_fsdp2(rank):
    model = sharded()
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(model, optimizer, tokens(rank))
    assert_same_weights(model, trained_alone(), rtol=1e-3, atol=2e-4)
    with pytest.raises(AssertionError):
        assert_same_weights(model, whole())


def check_values_and_generate_of_shards(_rank):
    model, alone = sharded(), whole()
    with torch.no_grad():
        assert torch.equal(model.values(tokens()), alone.values(tokens()))
    arguments = {"attention_mask": torch.ones_like(tokens()), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(sharded().generate(tokens(), **arguments), alone.generate(tokens(), **arguments))


def check_a_body_that_is_a_unit_of_its_own(_rank):
    """`values` passes the language model by, and with it the place where its own unit would be gathered."""
    with torch.no_grad():
        assert torch.equal(sharded_body()(tokens()).value, whole()(tokens()).value)
        with pytest.raises(RuntimeError, match="DTensor"):
            sharded_body().values(tokens())


def sharded_body():
    from torch.distributed.fsdp import fully_shard

    model = whole()
    fully_shard(model.pretrained_model)
    fully_shard(model)
    return model


def trained_shards(rank, wrapper=AutoModelForCausalLMWithValueHead):
    model = sharded(wrapper)
    optimizer = optimizer_of(model)
    step(model, optimizer, tokens(rank))
    return model, optimizer


def check_sharded_state(rank):
    model, _ = trained_shards(rank)
    state = get_model_state_dict(model)
    assert set(state) == set(whole().state_dict())
    other = sharded()
    result = set_model_state_dict(other, state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_weights(model, other)
    third = sharded()
    third.load_state_dict(model.state_dict())
    assert_same_weights(model, third)


def check_full_state(rank):
    """One process gathers a checkpoint that `from_pretrained` reads, and gives it to all again."""
    model, _ = trained_shards(rank)
    state = get_model_state_dict(model, options=FULL)
    assert bool(state) == (rank == 0)
    other = sharded()
    set_model_state_dict(other, dict(state), options=FROM_RANK_0)
    assert_same_weights(model, other)
    copied = whole()
    expected = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            copied.save_pretrained(folder, state_dict=state)
            loaded = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def check_optimizer_state(rank):
    """Under raw names, which torch's optimizer states have whatever the model says; strictly."""
    for options in (StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)):
        model, optimizer = trained_shards(rank, RawNames)
        weights, state = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer, options=options)
        other = sharded(RawNames)
        resumed = optimizer_of(other)
        # Copied, as a file would: they are views of the live weights, and of the live moments.
        set_model_state_dict(other, copy.deepcopy(weights))
        set_optimizer_state_dict(other, resumed, copy.deepcopy(state), options=options)
        for run, moments in ((model, optimizer), (other, resumed)):
            step(run, moments, tokens(rank))
        assert_same_weights(model, other)
        forgetful = sharded(RawNames)
        set_model_state_dict(forgetful, copy.deepcopy(weights))
        step(forgetful, optimizer_of(forgetful), tokens(rank))
        with pytest.raises(AssertionError):
            assert_same_weights(model, forgetful)


def check_optimizer_state_under_checkpoint_names_is_refused(rank):
    """Torch takes an optimizer's names from `named_parameters`, and looks them up under the state dict's."""
    model, optimizer = trained_shards(rank)
    state = get_optimizer_state_dict(model, optimizer)
    with pytest.raises(RuntimeError, match="Missing optimizer state"):
        set_optimizer_state_dict(model, optimizer, state)


CHECKS = [
    check_ddp,
    check_fsdp2,
    check_values_and_generate_of_shards,
    check_a_body_that_is_a_unit_of_its_own,
    check_sharded_state,
    check_full_state,
    check_optimizer_state,
    check_optimizer_state_under_checkpoint_names_is_refused,
]


@pytest.fixture(scope="module")
def outcomes():
    return outcomes_of(CHECKS)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="torch >= 2.6")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(check, outcomes):
    assert outcomes[check.__name__] == ["passed"] * RANKS
