"""State dicts go out and in strictly, in every layout, alone, inside a parent, and through copies."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from tests.library_versions import TORCH_ASKS_FOR_NAMES
from tests.modeling.tiny_models import CAUSAL, SEQ2SEQ, batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead


def wrapped(architecture="llama"):
    seq2seq = architecture in SEQ2SEQ
    wrapper = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
    model = wrapper(build(architecture))
    torch.nn.init.normal_(model.v_head.summary.bias)
    return model


def scrambled(model):
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert not same(other, model)
    return other


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


LAYOUTS = {
    "checkpoint": lambda model: model.state_dict(),
    "raw module": torch.nn.Module.state_dict,
    "module. and checkpoint": lambda model: {f"module.{k}": v for k, v in model.state_dict().items()},
    "module. and raw module": lambda model: {f"module.{k}": v for k, v in torch.nn.Module.state_dict(model).items()},
}


@pytest.mark.parametrize("architecture", [*CAUSAL, *SEQ2SEQ])
def test_strict_round_trip(architecture):
    model = wrapped(architecture)
    other = scrambled(model)
    result = other.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(model, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(layout):
    model = wrapped()
    other, state = scrambled(model), LAYOUTS[layout](model)
    names = list(state)
    other.load_state_dict(state)
    assert same(model, other)
    assert list(state) == names


def test_a_missing_or_stray_name_is_an_error():
    model = wrapped()
    state = model.state_dict()
    del state["v_head.summary.bias"]
    with pytest.raises(RuntimeError, match=r"v_head\.summary\.bias"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="stray"):
        model.load_state_dict({**model.state_dict(), "stray.weight": torch.ones(1)})


def test_the_head_alone_loads_as_llama_factory_does_it():
    model = wrapped()
    other = scrambled(model)
    head = {name: value for name, value in model.state_dict().items() if name.startswith("v_head.")}
    result = other.load_state_dict(head, strict=False)
    assert not result.unexpected_keys
    assert same(model.v_head, other.v_head)
    assert model.head_source is None
    assert other.head_source == "load_state_dict"


class Parent(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.before = torch.nn.Linear(2, 2)
        self.policy = model
        self.after = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("wrap", [Parent, torch.nn.DataParallel, lambda m: torch.nn.Sequential(Parent(m))])
def test_inside_a_parent_module(wrap):
    model = wrapped()
    parent, other = wrap(model), wrap(scrambled(model))
    state = parent.state_dict()
    prefix = next(name for name in state if name.endswith("v_head.summary.weight")).removesuffix(
        "v_head.summary.weight"
    )
    assert [n.removeprefix(prefix) for n in state if n.startswith(prefix)] == list(model.state_dict())
    if wrap is Parent:
        assert next(iter(state)) == "before.weight"
        assert list(state)[-1] == "after.bias"
    other.load_state_dict(state)
    assert same(model, next(m for m in other.modules() if type(m) is type(model)))


def test_two_wrappers_inside_one_parent():
    parent = torch.nn.ModuleDict({"policy": wrapped("llama"), "critic": wrapped("gpt2")})
    other = scrambled(parent)
    other.load_state_dict(parent.state_dict())
    assert same(parent, other)


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_inside_distributed_data_parallel(process_group):
    model = wrapped()
    other = scrambled(model)
    ddp, other_ddp = (torch.nn.parallel.DistributedDataParallel(m) for m in (model, other))
    state = ddp.state_dict()
    assert list(state) == [f"module.{name}" for name in model.state_dict()]
    other_ddp.load_state_dict(state)
    assert same(model, other)
    scrambled(model).load_state_dict(state)
    output = ddp(**batch(model.pretrained_model))
    (output.logits.mean() + output.value.mean()).backward()
    assert model.v_head.summary.weight.grad.abs().max() > 0


@pytest.mark.skipif(not TORCH_ASKS_FOR_NAMES, reason="torch.distributed.checkpoint takes names for paths of modules")
@pytest.mark.parametrize("wrap", [lambda model: model, Parent], ids=["alone", "in a parent"])
def test_distributed_checkpoints_have_the_same_names(wrap):
    model = wrap(wrapped("gpt2"))
    other = scrambled(model)
    state = get_model_state_dict(model)
    assert set(state) == set(model.state_dict())
    result = set_model_state_dict(other, state, options=StateDictOptions(strict=True))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(model, other)


def test_destination_prefix_and_keep_vars():
    model = wrapped()
    destination = {"other": 1}
    state = model.state_dict(destination=destination, prefix="x.y.", keep_vars=True)
    assert state is destination
    assert next(iter(state)) == "other"
    assert list(state)[1:] == [f"x.y.{name}" for name in model.state_dict()]
    assert state["x.y.v_head.summary.weight"] is model.v_head.summary.weight


def test_names_of_torchs_own_state_dict_are_kept_for_those_who_ask_for_them(monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "state_dict", torch.nn.Module.state_dict)
    model = wrapped()
    state = model.state_dict()
    assert [name for name, _ in model.named_parameters()] == [n for n in state if n in dict(model.named_parameters())]
    scrambled(model).load_state_dict(state)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("architecture", ["llama", "bloom", "t5"])
@pytest.mark.parametrize("make_copy", [copy.deepcopy, through_pickle])
@torch.no_grad()
def test_copies_are_whole_also_after_a_forward(architecture, make_copy):
    model = wrapped(architecture)
    inputs = batch(model.pretrained_model)
    expected = model(**inputs)
    other = make_copy(model)
    assert same(model, other)
    assert torch.equal(other(**inputs).value, expected.value)
    assert torch.equal(other.values(**inputs), model.values(**inputs))
    with torch.no_grad():
        other.v_head.summary.bias.add_(1.0)
        next(other.pretrained_model.parameters()).add_(1.0)
    assert torch.equal(model(**inputs).value, expected.value)
    assert other.get_input_embeddings() is other.pretrained_model.get_input_embeddings()


def test_a_wrapper_leaves_no_hooks_in_its_body():
    model = wrapped("bloom")
    model(**batch(model.pretrained_model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tied_weights_can_be_saved_by_their_state_dict_alone(tmp_path):
    """As transformers' Trainer does it, by a library that refuses weights which share memory."""
    model = wrapped("gpt2")
    body = model.pretrained_model
    assert body.lm_head.weight is body.transformer.wte.weight
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    other = scrambled(model)
    other.load_state_dict(state)
    assert same(model, other)
    assert other.pretrained_model.lm_head.weight is other.pretrained_model.transformer.wte.weight
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(torch.nn.Module.state_dict(model), tmp_path / "raw.safetensors")


def test_tied_weights_are_copied_for_savers_only():
    model = wrapped("gpt2")
    kept = model.state_dict(keep_vars=True)
    assert kept["lm_head.weight"] is kept["transformer.wte.weight"] is model.pretrained_model.lm_head.weight
    state = model.state_dict()
    own = {name: value.data_ptr() for name, value in torch.nn.Module.state_dict(model).items()}
    copies = {name for name, value in state.items() if value.data_ptr() not in own.values()}
    assert copies == {"lm_head.weight"}


@pytest.mark.parametrize("given", [False, True])
def test_tied_weights_are_saved_once(tmp_path, given):
    model = wrapped("gpt2")
    model.save_pretrained(tmp_path, **({"state_dict": model.state_dict()} if given else {}))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert same(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path), model)
