"""What is kept and what is built, measured on the tensors themselves."""

import dataclasses
import weakref

import pytest
import torch
from transformers import PreTrainedModel

from tests.library_versions import SELECTS_HIDDEN_STATES
from tests.modeling.tiny_models import SEQ2SEQ, batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from vhead.backbone.hidden_states import Retention
from vhead.upstream import cache_of

LAYERS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "t5": "decoder.block",
    "bart": "model.decoder.layers",
}


def wrapped(architecture):
    seq2seq = architecture in SEQ2SEQ
    return (AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead)(build(architecture))


class Census:
    """Counts the layers' outputs that are still alive when the language-model head is called, and after the call."""

    def __init__(self, body: PreTrainedModel, layers: str) -> None:
        self._outputs: list[weakref.ref] = []
        self.at_lm_head = None
        for layer in body.get_submodule(layers):
            layer.register_forward_hook(self._note)
        body.get_output_embeddings().register_forward_pre_hook(self._count)

    def _note(self, _layer, _args, output):
        self._outputs.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    def _count(self, _head, _args):
        self.at_lm_head = self.alive()

    def alive(self):
        return sum(reference() is not None for reference in self._outputs)


@pytest.mark.parametrize("architecture", LAYERS)
@torch.no_grad()
def test_forward_keeps_no_state_of_an_inner_layer(architecture):
    model = wrapped(architecture)
    census = Census(model.pretrained_model, LAYERS[architecture])
    output = model(**batch(model.pretrained_model))
    # The last layer's output may be what the final normalisation returned, or still be a local variable.
    assert census.at_lm_head <= 1
    assert census.alive() == 0
    assert output.value is not None


@pytest.mark.parametrize("architecture", LAYERS)
@torch.no_grad()
def test_the_census_sees_what_output_hidden_states_keeps(architecture):
    body = build(architecture)
    census = Census(body, LAYERS[architecture])
    output = body(**batch(body), output_hidden_states=True)
    assert census.at_lm_head >= 2
    assert output is not None


@pytest.mark.skipif(not SELECTS_HIDDEN_STATES, reason="transformers keeps all hidden states or none")
@torch.no_grad()
def test_transformers_own_selection_keeps_no_state_of_an_inner_layer_either():
    model = wrapped("llama")
    assert model.plan.compiled_retention is Retention.SELECT
    expected = model(**batch(model.pretrained_model))
    model.plan = dataclasses.replace(model.plan, retention=Retention.SELECT)
    census = Census(model.pretrained_model, LAYERS["llama"])
    assert torch.equal(model(**batch(model.pretrained_model)).value, expected.value)
    assert census.at_lm_head <= 1


class LogitsBuiltError(Exception):
    pass


def forbid_logits(model):
    def refuse(*_args):
        raise LogitsBuiltError

    model.get_output_embeddings().register_forward_pre_hook(refuse)
    return model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "opt", "bloom", "t5", "bart"])
@torch.no_grad()
def test_values_builds_no_logits(architecture):
    model = wrapped(architecture)
    inputs = batch(model.pretrained_model)
    expected = model.values(**inputs)
    forbid_logits(model)
    assert torch.equal(model.values(**inputs), expected)
    with pytest.raises(LogitsBuiltError):
        model(**inputs)


@torch.no_grad()
def test_values_builds_no_cache():
    model = wrapped("llama")
    seen = []
    model.backbone.register_forward_hook(lambda _module, _args, output: seen.append(cache_of(output)))
    model.values(**batch(model.pretrained_model))
    assert seen == [None]
