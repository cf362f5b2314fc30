"""The last hidden state is transformers' own, bit for bit, and does not depend on which side padding is."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from packaging.version import Version
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tests.library_versions import HAS_FSMT, TRACES_WHOLE_MODELS, TRANSFORMERS
from tests.modeling.tiny_models import CAUSAL, SEQ2SEQ, batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from vhead.backbone.hidden_states import BackbonePlan, Retention, Route, last_hidden_state, plan_for
from vhead.backbone.padding import Padding
from vhead.errors import VheadError
from vhead.upstream import CACHE

ROUTES = dict.fromkeys(CAUSAL, Route.BASE_MODEL) | {
    "bart": Route.BASE_MODEL,
    "t5": Route.ENCODER_DECODER,
    "fsmt": Route.FULL_FORWARD,
}


def transformers_last(body, inputs):
    output = body(**inputs, output_hidden_states=True)
    return (output.decoder_hidden_states if body.config.is_encoder_decoder else output.hidden_states)[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ROUTES)
@torch.no_grad()
def test_last_hidden_state_is_transformers_own(architecture, dtype):
    if architecture == "fsmt" and dtype == torch.bfloat16 and Version("4.46") > TRANSFORMERS:
        pytest.skip("its attention mixes dtypes")
    if architecture == "fsmt" and not HAS_FSMT:
        pytest.skip(f"transformers {TRANSFORMERS}'s own FSMT is broken")
    body = build(architecture, dtype)
    inputs = batch(body)
    assert plan_for(body).route is ROUTES[architecture]
    expected = transformers_last(body, inputs)
    if not body.config.is_encoder_decoder:
        # Positions are derived from the mask; padding then sits at other positions on some models.
        real = inputs["attention_mask"].bool()
        assert torch.equal(last_hidden_state(body, **inputs)[real], expected[real])
    else:
        assert torch.equal(last_hidden_state(body, **inputs), expected)


@torch.no_grad()
def test_the_lm_heads_input_is_not_it():
    """Why the input of the language-model head is not used: T5 scales it."""
    body = build("t5")
    inputs, seen = batch(body), []
    body.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    assert not torch.equal(transformers_last(body, inputs), seen[0])


def test_the_plan_is_plain_data():
    plan = plan_for(build("llama"))
    assert plan == BackbonePlan(
        architecture=type(build("llama")),
        route=Route.BASE_MODEL,
        retention=Retention.CAPTURE,
        compiled_retention=plan.compiled_retention,
        takes_position_ids=True,
        is_encoder_decoder=False,
        padding=Padding.BEHIND,
        cache_argument=CACHE,
    )
    assert plan_for(build("bloom")).compiled_retention is Retention.CAPTURE
    assert plan_for(build("fsmt")).retention is Retention.ALL_LAYERS


class Painter(PreTrainedModel):
    """Takes patches alone, and knows no other name, as Pix2Struct before transformers 5."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.projection = torch.nn.Linear(4, 8)

    def forward(self, patches, return_dict=None, output_hidden_states=None):
        return CausalLMOutput(hidden_states=(self.projection(patches),))


class Reader(Painter):
    """Has to be given token ids, be they None, as FSMT beside `encoder_outputs`."""

    def forward(self, input_ids, patches=None, return_dict=None, output_hidden_states=None):
        assert input_ids is None
        return super().forward(patches)


@pytest.mark.parametrize("kind", [Painter, Reader])
@torch.no_grad()
def test_inputs_that_are_none_are_passed_where_they_must_be(kind):
    model, patches = kind(), torch.randn(2, 3, 4)
    plan = plan_for(model)
    assert plan.needs_input_ids == (kind is Reader)
    states = last_hidden_state(model, plan=plan, input_ids=None, attention_mask=None, patches=patches)
    assert torch.equal(states, model.projection(patches))


def left_padded(tokens, padding):
    rows, mask = [], []
    for row in tokens:
        rows.append(torch.cat([torch.zeros(padding, dtype=torch.long), row]))
        mask.append(torch.cat([torch.zeros(padding, dtype=torch.long), torch.ones(len(row), dtype=torch.long)]))
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(mask)}


@pytest.mark.parametrize("architecture", CAUSAL)
@torch.no_grad()
def test_left_padding_gives_the_unpadded_values(architecture):
    model = AutoModelForCausalLMWithValueHead(build(architecture))
    tokens = torch.randint(3, 97, (2, 6))
    expected = model.values(tokens)
    padded = left_padded(tokens, 4)
    torch.testing.assert_close(model.values(**padded)[:, 4:], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_forward_leaves_positions_to_the_model_as_trl_did():
    """The control of the test above: without derived positions, left padding shifts a model with absolute ones."""
    model = AutoModelForCausalLMWithValueHead(build("gpt2"))
    tokens = torch.randint(3, 97, (2, 6))
    padded = left_padded(tokens, 4)
    assert not torch.allclose(model(**padded).value[:, 4:], model.values(tokens), atol=1e-2)
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(model(**padded, position_ids=positions).value[:, 4:], model.values(**padded)[:, 4:])


@pytest.mark.parametrize("architecture", CAUSAL)
@torch.no_grad()
def test_padding_on_either_side_is_the_same(architecture):
    model = AutoModelForCausalLMWithValueHead(build(architecture))
    inputs = batch(model.pretrained_model)
    alone = model.values(inputs["input_ids"][1:, :5])
    torch.testing.assert_close(model.values(**inputs)[1:, :5], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "t5"])
@torch.no_grad()
def test_padding_changes_neither_log_probabilities_nor_values_of_forward(architecture):
    """As TRL's old trainer pads: on the right, an encoder's input on its own."""
    seq2seq = architecture in SEQ2SEQ
    wrapper = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
    model = wrapper(build(architecture))
    inputs = batch(model.pretrained_model)
    together = model(**inputs)
    alone = model(**{name: value[1:, : value.shape[1] - 2] for name, value in inputs.items()})
    length = alone.value.shape[1]
    torch.testing.assert_close(together.value[1:, :length], alone.value, rtol=1e-4, atol=1e-5)
    together, alone = (output.logits.log_softmax(-1) for output in (together, alone))
    torch.testing.assert_close(together[1:, :length], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_given_position_ids_are_used():
    model = AutoModelForCausalLMWithValueHead(build("gpt2"))
    inputs = batch(model.pretrained_model)
    shifted = torch.arange(7).expand(2, 7) + 5
    assert not torch.allclose(model.values(**inputs, position_ids=shifted), model.values(**inputs), atol=1e-2)


@torch.no_grad()
def test_values_continue_from_a_cache():
    model = AutoModelForCausalLMWithValueHead(build("gpt2"))
    padded = left_padded(torch.randint(3, 97, (2, 6)), 3)
    whole = model.values(**padded)
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, :7]
    first = model(
        padded["input_ids"][:, :7],
        attention_mask=padded["attention_mask"][:, :7],
        position_ids=positions,
        return_past_key_values=True,
    )
    rest = model.values(
        padded["input_ids"][:, 7:], attention_mask=padded["attention_mask"], past_key_values=first.past_key_values
    )
    torch.testing.assert_close(rest, whole[:, 7:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", SEQ2SEQ)
@torch.no_grad()
def test_labels_stand_for_the_decoder_tokens_they_imply(architecture):
    model = AutoModelForSeq2SeqLMWithValueHead(build(architecture))
    inputs = batch(model.pretrained_model)
    labels = inputs.pop("decoder_input_ids")
    assert torch.equal(model.values(**inputs, labels=labels), model(**inputs, labels=labels).value)


@torch.no_grad()
def test_encoder_outputs_are_used_instead_of_the_encoder():
    model = AutoModelForSeq2SeqLMWithValueHead(build("t5"))
    inputs = batch(model.pretrained_model)
    expected = model.values(**inputs)
    states = model.pretrained_model.encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    del inputs["input_ids"]
    assert torch.equal(model.values(**inputs, encoder_outputs=states), expected)


def test_an_encoder_decoder_without_decoder_tokens_is_an_error():
    model = AutoModelForSeq2SeqLMWithValueHead(build("t5"))
    with pytest.raises(VheadError, match="decoder_input_ids"):
        model.values(torch.ones(1, 3, dtype=torch.long))


def test_threads_sharing_a_model_get_their_own_states():
    model = AutoModelForCausalLMWithValueHead(build("gpt2"))
    inputs = [{"input_ids": torch.randint(3, 97, (1, length))} for length in (4, 6)]
    with torch.no_grad():
        expected = [model(**each).value for each in inputs]
    # Both threads have run the trunk before either goes on to the language-model head.
    meeting = threading.Barrier(2, timeout=30)
    model.get_output_embeddings().register_forward_hook(lambda _module, _args, logits: (meeting.wait(), logits)[1])

    @torch.no_grad()
    def run(each):
        return model(**each).value

    with ThreadPoolExecutor(2) as pool:
        values = list(pool.map(run, inputs))
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


# Without a selection of hidden states there are graph breaks, which torch 2.4 warns about.
@pytest.mark.filterwarnings("ignore:Graph break due to unsupported builtin")
@torch.no_grad()
def test_forward_and_values_compile():
    model = AutoModelForCausalLMWithValueHead(build("llama"))
    inputs = batch(model.pretrained_model)
    expected = model(**inputs).value
    torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).value, expected)
    values = torch.compile(lambda: model.values(**inputs), backend="eager", fullgraph=TRACES_WHOLE_MODELS)
    torch.testing.assert_close(values(), expected)
    padded = left_padded(torch.randint(3, 97, (2, 6)), 4)
    expected = model.values(**padded)
    values = torch.compile(lambda: model.values(**padded), backend="eager", fullgraph=TRACES_WHOLE_MODELS)
    torch.testing.assert_close(values()[:, 4:], expected[:, 4:])


def with_adapter(peft, config):
    with warnings.catch_warnings():
        # peft reads an attribute that transformers 5 renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(build("llama"), config)


def test_lora_stays_in_place_and_prompt_learning_runs_through_the_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    lora = with_adapter(peft, config)
    inputs = batch(lora.get_base_model())
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = lora(**inputs, output_hidden_states=True).hidden_states[-1]
        assert plan_for(lora).route is Route.BASE_MODEL
        assert torch.equal(last_hidden_state(lora, **inputs)[real], expected[real])
        with lora.disable_adapter():
            assert not torch.equal(last_hidden_state(lora, **inputs)[real], expected[real])
    prompt = with_adapter(peft, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert plan_for(prompt).route is Route.FULL_FORWARD
    with torch.no_grad():
        assert last_hidden_state(prompt, **inputs).shape[1] == 3 + inputs["input_ids"].shape[1]
