"""The reference: frozen, independent, and with one storage for what it shares."""

import logging

import pytest
import torch

import vhead.modeling.reference_model
from tests.modeling.tiny_models import batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, create_reference_model
from vhead.errors import ReferenceModelError


def wrapped(architecture="llama"):
    return AutoModelForCausalLMWithValueHead(build(architecture)).train()


def step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    output = model(**batch(model.pretrained_model))
    (output.logits.square().mean() + output.value.square().mean()).backward()
    optimizer.step()


def test_an_independent_frozen_copy():
    model = wrapped()
    reference = create_reference_model(model)
    assert not reference.training
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    before = {name: parameter.clone() for name, parameter in reference.named_parameters()}
    step(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in reference.named_parameters())
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if p.dim() > 1)


@pytest.mark.parametrize("shared_layers", [None, 1])
def test_a_reference_starts_as_the_policy_and_stays(shared_layers):
    model = wrapped("gpt2")
    reference = create_reference_model(model, num_shared_layers=shared_layers)
    start = {name: value.clone() for name, value in wrapped("gpt2").state_dict().items()}
    tokens = torch.randint(3, 97, (2, 6))
    output = model(tokens, labels=tokens)
    (output.loss + output.value.square().mean()).backward()
    torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1.0).step()
    for name, parameter in reference.named_parameters():
        assert parameter.grad is None
        if "v_head" not in name:
            assert torch.equal(parameter, start[name.removeprefix("pretrained_model.")]), name
    changed = {
        name for name, value in model.pretrained_model.state_dict().items() if not torch.equal(value, start[name])
    }
    layer = "transformer.h.{}.attn.c_attn.weight"
    assert [layer.format(i) in changed for i in range(3)] == [shared_layers is None, True, True]
    assert "transformer.ln_f.weight" in changed
    assert model.v_head.summary.weight.grad is not None


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_shared_layers_lie_in_the_same_memory(architecture):
    model = wrapped(architecture)
    reference = create_reference_model(model, num_shared_layers=2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    step(model)
    layer_names = {"llama": "layers.{}.", "gpt2": "h.{}.", "opt": "layers.{}."}[architecture]
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        shared = any(layer_names.format(i) in name for i in (0, 1)) or "embed" in name or "wte" in name or "wpe" in name
        if "final_layer_norm" in name or "project_out" in name or "project_in" in name:
            continue  # named before the layers on one architecture, after them on another
        assert (parameter.data_ptr() == theirs[name].data_ptr()) == shared, name
        assert torch.equal(parameter, before[name]) == shared or parameter.grad is None, name
        assert parameter.requires_grad != shared, name
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_layers_with_two_digits_keep_their_order():
    model = wrapped_with_layers(12)
    reference = dict(create_reference_model(model, num_shared_layers=10).named_parameters())
    name = "pretrained_model.model.layers.{}.mlp.up_proj.weight"
    shared = [reference[name.format(i)].data_ptr() == model.get_parameter(name.format(i)).data_ptr() for i in range(12)]
    assert shared == [True] * 10 + [False] * 2


def wrapped_with_layers(layers):
    return AutoModelForCausalLMWithValueHead(build("llama", num_hidden_layers=layers))


def test_tied_embeddings_stay_tied_and_shared():
    model = AutoModelForCausalLMWithValueHead(build("gpt2"))
    reference = create_reference_model(model, num_shared_layers=1)
    body, copied = model.pretrained_model, reference.pretrained_model
    assert copied.lm_head.weight is copied.transformer.wte.weight
    assert copied.lm_head.weight.data_ptr() == body.lm_head.weight.data_ptr()
    assert copied.lm_head.weight is not body.lm_head.weight


def test_a_given_pattern_and_an_encoder_decoder():
    model = wrapped("llama")
    reference = create_reference_model(model, num_shared_layers=1, pattern="model.layers.{layer}")
    name = "pretrained_model.model.layers.0.mlp.up_proj.weight"
    assert reference.get_parameter(name).data_ptr() == model.get_parameter(name).data_ptr()
    create_reference_model(AutoModelForSeq2SeqLMWithValueHead(build("t5")), num_shared_layers=1)


@pytest.mark.parametrize(
    ("layers", "pattern"), [(99, None), (-1, None), (1, "nothing.{layer}"), (99, "layers.{layer}")]
)
def test_a_pattern_that_matches_nothing_changes_nothing(layers, pattern):
    model = wrapped()
    with pytest.raises(ValueError, match=r"pattern: no parameter of the .* is named like layer"):
        create_reference_model(model, num_shared_layers=layers, pattern=pattern)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_zero3_is_refused(monkeypatch, caplog):
    monkeypatch.setattr(vhead.modeling.reference_model, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ReferenceModelError, match="ZeRO-3"), caplog.at_level(logging.WARNING):
        create_reference_model(wrapped())


def test_same_as_trls(monkeypatch):
    pytest.importorskip("trl.experimental.ppo", exc_type=ImportError)
    from trl.experimental.utils import create_reference_model as trls

    ours, theirs = wrapped("llama"), wrapped("llama")
    our_reference, their_reference = create_reference_model(ours, 1), trls(theirs, 1)
    for (name, a), (_, b) in zip(our_reference.named_parameters(), their_reference.named_parameters(), strict=True):
        shared = ours.get_parameter(name).data_ptr() == a.data_ptr()
        assert shared == (theirs.get_parameter(name).data_ptr() == b.data_ptr())
        assert ours.get_parameter(name).requires_grad == theirs.get_parameter(name).requires_grad
        assert a.requires_grad is b.requires_grad is False
