"""Against TRL 1.12's own classes, in one process, on the same weights."""

import copy
import inspect

import pytest
import torch

from tests.modeling.tiny_models import CAUSAL, SEQ2SEQ, batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

trl = pytest.importorskip("trl.experimental.ppo", exc_type=ImportError)

ARCHITECTURES = [*CAUSAL, *SEQ2SEQ]
DTYPES = [torch.float32, torch.bfloat16]
HEAD_KEYS = ["v_head.summary.weight", "v_head.summary.bias"]

# TRL's class hands a cache on by its old name. That ours does not, the rest of the suite holds.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def twins(architecture, dtype=torch.float32, *, dropout=0.0):
    """TRL's model and ours: two copies of one body, one head's weights."""
    seq2seq = architecture in SEQ2SEQ
    theirs_class = trl.AutoModelForSeq2SeqLMWithValueHead if seq2seq else trl.AutoModelForCausalLMWithValueHead
    ours_class = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
    body = build(architecture, dtype)
    theirs = theirs_class.from_pretrained(copy.deepcopy(body), summary_dropout_prob=dropout).eval()
    ours = ours_class.from_pretrained(body, summary_dropout_prob=dropout).eval()
    ours.v_head.load_state_dict(theirs.v_head.state_dict())
    return theirs, ours


def hidden_states_of(model, inputs):
    output = model.pretrained_model(**inputs, output_hidden_states=True)
    states = output.decoder_hidden_states if model.pretrained_model.config.is_encoder_decoder else output.hidden_states
    return states[-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_forward_gives_trls_logits_and_values_within_trls_error(architecture, dtype):
    theirs, ours = twins(architecture, dtype)
    inputs = batch(ours.pretrained_model)
    their_logits, their_loss, their_value = theirs(**inputs)
    logits, loss, value = ours(**inputs)
    assert logits.dtype == value.dtype == torch.float32
    assert torch.equal(logits, their_logits)
    assert loss is their_loss is None
    assert value.shape == their_value.shape == inputs.get("decoder_input_ids", inputs["input_ids"]).shape

    states, summary = hidden_states_of(theirs, inputs).double(), theirs.v_head.summary
    products = states * summary.weight[0].double()
    truth = products.sum(-1) + summary.bias.double()
    # One rounding of the sum of magnitudes is what any order of float32 additions may cost.
    rounding = (products.abs().sum(-1) + summary.bias.abs()).max() * torch.finfo(torch.float32).eps
    assert (value - truth).abs().max() <= max((their_value - truth).abs().max(), rounding)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_values_are_those_of_forward_bit_for_bit(architecture):
    _, ours = twins(architecture)
    inputs = batch(ours.pretrained_model)
    real = inputs["attention_mask"].bool() if architecture in CAUSAL else slice(None)
    assert torch.equal(ours.values(**inputs)[real], ours(**inputs).value[real])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_loss_cache_and_logits_to_keep_pass_through(architecture):
    theirs, ours = twins(architecture)
    inputs = batch(ours.pretrained_model)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"]).clone()
    assert torch.equal(ours(**inputs, labels=labels).loss, theirs(**inputs, labels=labels)[1])
    output = ours(**inputs, return_past_key_values=True)
    assert len(output) == 4
    assert type(output.past_key_values) is type(theirs(**inputs, return_past_key_values=True)[3])
    if architecture in CAUSAL:
        kept = ours(**inputs, logits_to_keep=1)
        assert kept.logits.shape[1] == 1
        assert torch.equal(kept.logits, theirs(**inputs, logits_to_keep=1)[0])
        assert torch.equal(kept.value, ours(**inputs).value)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_generate_is_the_bodys(architecture):
    theirs, ours = twins(architecture)
    inputs = {name: value[:1] for name, value in batch(ours.pretrained_model).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_state_dict_has_trls_names_in_trls_order(architecture):
    theirs, ours = twins(architecture)
    expected, state = theirs.state_dict(), ours.state_dict()
    assert list(state) == list(expected)
    assert list(state)[-2:] == HEAD_KEYS
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "t5"])
def test_a_training_step_gives_trls_gradients(architecture):
    theirs, ours = (model.train() for model in twins(architecture))
    for module in [*theirs.modules(), *ours.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = batch(ours.pretrained_model)
    for model in (theirs, ours):
        logits, _, value = model(**inputs)
        (logits.log_softmax(-1)[..., 5].mean() + (value - 0.3).square().mean()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)
        assert parameter.grad.abs().max() > 0, name


def test_callers_see_trls_arguments():
    for theirs, ours in (
        (trl.AutoModelForCausalLMWithValueHead, AutoModelForCausalLMWithValueHead),
        (trl.AutoModelForSeq2SeqLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead),
    ):
        assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
        assert set(theirs.supported_args) == set(ours.supported_args)
        assert theirs.transformers_parent_class is ours.transformers_parent_class


def test_attributes_of_trls_object_exist():
    theirs, ours = twins("llama")
    assert [name for name in dir(theirs) if not name.startswith("_") and not hasattr(ours, name)] == []
    assert not hasattr(ours, "is_encoder_decoder")
    assert twins("t5")[1].is_encoder_decoder is True
