"""What ROLL (commit 8eb27cc) does to the object, re-enacted demand by demand."""

import torch
from transformers.modeling_outputs import TokenClassifierOutput

from tests.consumers.critics import H, language_model
from vhead import AutoModelForCausalLMWithValueHead


def test_model_settings_beside_an_object_are_tolerated(body):
    """`roll/models/model_providers.py`, `load_model`: `from_pretrained(model, **model_config_kwargs)`."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body, attn_implementation="eager")
    assert model.pretrained_model is body


@torch.no_grad()
def test_the_forward_that_replaces_the_instances_own(model, tokens):
    """`roll/models/trl_patches.py`, `token_classifier_forward`: the head's `[B, S, 1]` as a classifier's logits."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        output = self.pretrained_model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states = output.hidden_states[-1]
        if states.device != self.v_head.summary.weight.device:
            states = states.to(self.v_head.summary.weight.device)
        return TokenClassifierOutput(logits=self.v_head(states))

    expected = model(tokens).value
    model.forward = forward.__get__(model)
    logits = model(input_ids=tokens).logits
    assert logits.shape == (*tokens.shape, 1)
    assert torch.equal(logits.squeeze(-1), expected)


def test_the_class_takes_a_post_init(monkeypatch, tmp_path, model):
    """`roll/models/model_providers.py`, `default_value_model_provider`: a class-level `post_init` without its hook."""
    monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "post_init", lambda self, state_dict: None, raising=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(loaded.v_head.summary.weight, model.v_head.summary.weight)


def test_the_load_state_dict_that_replaces_the_instances_own(model):
    """`roll/models/trl_patches.py`, `value_head_load_state_dict`: body and head load apart, not strictly."""
    target = AutoModelForCausalLMWithValueHead(language_model())
    state = torch.nn.Module.state_dict(model)

    def load_state_dict(self, state_dict, strict=False):
        plain = {name.removeprefix("pretrained_model."): value for name, value in state_dict.items()}
        self.pretrained_model.load_state_dict(plain, strict=False)
        self.v_head.load_state_dict(
            {name.removeprefix("v_head."): value for name, value in plain.items()}, strict=False
        )

    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1.0)
    target.load_state_dict = load_state_dict.__get__(target)
    target.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), target.parameters(), strict=True))


@torch.no_grad()
def test_frozen_weights_are_cast_in_place(model, tokens):
    """`roll/models/model_providers.py`, `load_model`: inference puts every parameter into the compute dtype."""
    expected = model(tokens).value
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    values = model(tokens).value
    assert model.v_head.summary.weight.dtype == torch.bfloat16
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, rtol=0.1, atol=0.1)


def test_its_value_head_file_loads(model):
    """`roll/models/model_providers.py`, `load_valuehead_params`: `load_state_dict(…, strict=False)` of two tensors."""
    weight, bias = torch.randn(1, H), torch.randn(1)
    model.load_state_dict({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, strict=False)
    assert torch.equal(model.v_head.summary.weight, weight)
    assert torch.equal(model.v_head.summary.bias, bias)
