"""Train and eval mode, dropout, dtype and device rules."""

import warnings

import pytest
import torch

from tests.modeling.tiny_models import batch, build
from vhead import AutoModelForCausalLMWithValueHead


def wrapped(**arguments):
    return AutoModelForCausalLMWithValueHead(build("llama"), **arguments)


def modes(model):
    return {module.training for module in model.modules()}


def test_loaded_from_a_path_everything_is_in_eval_mode(tmp_path):
    wrapped().save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert modes(model) == {False}
    inputs = batch(model.pretrained_model)
    assert torch.equal(model(**inputs).value, model(**inputs).value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [AutoModelForCausalLMWithValueHead, AutoModelForCausalLMWithValueHead.from_pretrained])
def test_the_head_takes_over_the_mode_of_a_given_object(make, training):
    model = make(build("llama").train(training))
    assert modes(model) == {training}
    assert modes(model.train()) == {True}
    assert modes(model.eval()) == {False}


def test_dropout_works_in_train_mode_only():
    model = wrapped(summary_dropout_prob=0.5)
    inputs = batch(model.pretrained_model)
    model.train()
    assert not torch.equal(model(**inputs).value, model(**inputs).value)
    torch.manual_seed(3)
    first = model(**inputs).value
    torch.manual_seed(3)
    assert torch.equal(first, model(**inputs).value)
    model.eval()
    assert torch.equal(model(**inputs).value, model(**inputs).value)


def test_direct_construction_works_fully():
    model = wrapped()
    inputs = batch(model.pretrained_model)
    assert len(model(**inputs)) == 3
    assert model.is_peft_model is False
    assert model.is_sequential_parallel is False
    assert model.current_device == ("cpu" if not torch.cuda.is_available() else torch.cuda.current_device())
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_head_is_float32_beside_a_half_precision_body(dtype):
    model = AutoModelForCausalLMWithValueHead(build("llama", dtype))
    assert model.v_head.summary.weight.dtype == torch.float32
    output = model(**batch(model.pretrained_model))
    assert output.logits.dtype == output.value.dtype == torch.float32
    assert model.dtype == dtype


@torch.no_grad()
def test_the_head_computes_in_float32_under_autocast_and_after_a_cast():
    model = wrapped()
    states = torch.randn(5, 32)
    expected = model.v_head(states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.v_head(states), expected)
        assert model(**batch(model.pretrained_model)).value.dtype == torch.float32
    model.bfloat16()
    rounded = torch.nn.functional.linear(
        states.double(), model.v_head.summary.weight.double(), model.v_head.summary.bias.double()
    )
    values = model.v_head(states)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), rounded, rtol=1e-5, atol=1e-5)
    assert model(**batch(model.pretrained_model)).value.dtype == torch.float32


def enable_checkpointing(model):
    with warnings.catch_warnings():
        # transformers 5 has a newer name for it; TRL's callers use this one.
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = wrapped(summary_dropout_prob=0.0).train()
        torch.manual_seed(0)
        model.v_head.initialize()
        if checkpointing:
            enable_checkpointing(model)
        assert model.is_gradient_checkpointing is checkpointing
        model(**batch(model.pretrained_model), use_cache=False).value.sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0]["pretrained_model.model.layers.0.mlp.up_proj.weight"].abs().max() > 0
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][name])


def test_gradients_of_minibatches_add_up_to_the_batch_s():
    model = wrapped()
    inputs = batch(model.pretrained_model)
    (model(**inputs).value - 0.3).square().mean().backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "v_head" in name}
    model.zero_grad()
    for row in range(2):
        minibatch = {name: value[row : row + 1] for name, value in inputs.items()}
        ((model(**minibatch).value - 0.3).square().mean() / 2).backward()
    for name, gradient in whole.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLMWithValueHead(build_on_meta())
    assert model.v_head.summary.weight.is_meta


def build_on_meta():
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.modeling.tiny_models import COMMON

    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON))
