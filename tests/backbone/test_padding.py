"""Values of padded rows are those of the same tokens alone, wherever padding is and whatever the model makes of it."""

import warnings

import pytest
import torch
import transformers
from torch import Tensor

from tests.architectures.tiny import build
from tests.library_versions import need_batches
from tests.modeling.tiny_models import build as build_plain
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from vhead.backbone import hidden_states
from vhead.backbone.padding import Padding

# Row by row: padding on the left, on the right, on both sides, between tokens, and none.
MASK = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 0, 1, 0, 0, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]
)
CAUSAL = [
    *("llama", "gpt2", "opt", "bloom", "mamba", "mamba2"),
    # Recurrent layers that read padding.
    *("recurrent_gemma", "rwkv", "xlstm"),
    # Blocks that begin at the first column.
    *("blt", "deepseek_v4"),
    # Positions by column, or by what is not the padding's id.
    *("bart", "whisper", "roberta", "xlm-roberta"),
    # Padding is seen wherever it is.
    *("cpmant", "reformer"),
]
SEQ2SEQ = ["t5", "bart", "led", "m2m_100", "fsmt"]


def wrapped(model_type: str, auto_class: str = "AutoModelForCausalLM"):
    need_batches(model_type)
    if not hasattr(transformers, auto_class):
        pytest.skip(f"this transformers has no {auto_class}")
    seq2seq = auto_class == "AutoModelForSeq2SeqLM"
    wrapper = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
    torch.manual_seed(3)
    return wrapper(build(model_type, auto_class), v_head_init_strategy="normal").eval()


def tokens(padding: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.where(MASK.bool(), torch.randint(3, 90, MASK.shape, generator=generator), padding)


@torch.no_grad()
def seeded_values(model, **inputs: object) -> Tensor:
    torch.manual_seed(0)  # Reformer hashes with random rotations.
    return model.values(**inputs)


def assert_rows_alone(model, ids: Tensor, values: Tensor) -> None:
    for row, mask in enumerate(MASK.bool()):
        alone = seeded_values(model, input_ids=ids[row, mask][None])
        torch.testing.assert_close(values[row, mask], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_padded_rows_have_the_values_of_their_tokens_alone(model_type, padding):
    model, ids = wrapped(model_type), tokens(padding)
    values = seeded_values(model, input_ids=ids, attention_mask=MASK)
    assert values.shape == MASK.shape
    assert values.isfinite().all()
    assert_rows_alone(model, ids, values)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_padded_rows_of_an_encoder_decoder_have_the_values_of_their_tokens_alone(model_type, side):
    model = wrapped(model_type, "AutoModelForSeq2SeqLM")
    ids, whole = tokens(7), tokens(7, seed=6)[-1:].expand(MASK.shape)
    names = ("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")
    own, other = names if side == "encoder" else names[::-1]
    # With a cache, FSMT leaves out the mask that keeps its decoder from looking ahead.
    options = {"use_cache": False} if model_type == "fsmt" else {}
    values = seeded_values(model, **{own[0]: ids, own[1]: MASK, other[0]: whole}, **options)
    for row, mask in enumerate(MASK.bool()):
        alone = seeded_values(model, **{own[0]: ids[row, mask][None], other[0]: whole[:1]}, **options)
        kept = mask if side == "decoder" else slice(None)
        torch.testing.assert_close(values[row, kept], alone[0], rtol=1e-3, atol=1e-4)


def test_labels_stay_where_they_are_when_the_encoder_s_tokens_move():
    model = wrapped("t5", "AutoModelForSeq2SeqLM")
    labels = tokens(7, seed=6)
    values = seeded_values(model, input_ids=tokens(0), attention_mask=MASK, labels=labels)
    for row, mask in enumerate(MASK.bool()):
        alone = seeded_values(model, input_ids=tokens(0)[row, mask][None], labels=labels[row][None])
        torch.testing.assert_close(values[row], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "cpmant"])
def test_a_row_of_padding_alone_leaves_the_others_as_they_are(model_type):
    model, ids, mask = wrapped(model_type), tokens(0), MASK.clone()
    mask[1] = 0
    values, expected = (seeded_values(model, input_ids=ids, attention_mask=each) for each in (mask, MASK))
    assert values.shape == expected.shape
    others = mask.bool()
    torch.testing.assert_close(values[others], expected[others], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "recurrent_gemma", "cpmant"])
def test_the_same_holds_for_embeddings_and_for_given_positions(model_type):
    model, ids = wrapped(model_type), tokens(0)
    expected = seeded_values(model, input_ids=ids, attention_mask=MASK)[MASK.bool()]
    if model_type != "cpmant":
        embeddings = model.get_input_embeddings()(ids)
        found = seeded_values(model, inputs_embeds=embeddings, attention_mask=MASK)[MASK.bool()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        counted = (MASK.cumsum(dim=-1) - 1).clamp(min=0)
        found = seeded_values(model, input_ids=ids, attention_mask=MASK, position_ids=counted)[MASK.bool()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found = seeded_values(model, input_ids=ids, attention_mask=MASK.bool())[MASK.bool()]
    assert torch.equal(found, expected)


def test_positions_of_several_kinds_move_with_their_tokens():
    model, ids = wrapped_image_model("qwen2_vl"), tokens(0)
    expected = seeded_values(model, input_ids=ids, attention_mask=MASK)
    counted = (MASK.cumsum(dim=-1) - 1).clamp(min=0).expand(3, *MASK.shape)
    found = seeded_values(model, input_ids=ids, attention_mask=MASK, position_ids=counted)
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-5)
    assert_rows_alone(model, ids, expected)


def test_padding_is_left_out_for_a_model_that_sees_its_prompt_in_both_directions():
    model, ids = wrapped_image_model("paligemma"), tokens(0)
    values = seeded_values(model, input_ids=ids, attention_mask=MASK)
    assert_rows_alone(model, ids, values)


def wrapped_image_model(model_type: str):
    return wrapped(model_type, "AutoModelForImageTextToText")


def test_gradients_reach_the_tokens_of_moved_rows_and_no_padding():
    model = wrapped("recurrent_gemma")
    embeddings = model.get_input_embeddings()(tokens(0)).detach().requires_grad_()
    values = model.values(inputs_embeds=embeddings, attention_mask=MASK)
    (values * MASK).pow(2).sum().backward()
    assert embeddings.grad[MASK.bool()].abs().sum(dim=-1).min() > 0
    assert not embeddings.grad[~MASK.bool()].any()


def test_virtual_tokens_of_an_adapter_stay_before_the_prompt():
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = AutoModelForCausalLMWithValueHead(peft.get_peft_model(build_plain("llama"), config)).eval()
    ids = tokens(0)
    values = seeded_values(model, input_ids=ids, attention_mask=MASK)
    assert values.shape == (len(MASK), 3 + MASK.shape[1])
    for row, mask in enumerate(MASK.bool()):
        alone = seeded_values(model, input_ids=ids[row, mask][None])[0]
        torch.testing.assert_close(values[row, 3:][mask], alone[3:], rtol=1e-4, atol=1e-5)


def test_a_batch_without_padding_before_a_token_goes_through_as_it_is(monkeypatch):
    model, seen = wrapped("llama"), []
    ids = tokens(0)
    model.pretrained_model.model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    right = MASK.sort(dim=-1, descending=True).values
    for mask in (None, torch.ones_like(MASK), right):
        seeded_values(model, input_ids=ids, attention_mask=mask)
        assert seen[-1] is ids
    seeded_values(model, input_ids=ids, attention_mask=MASK)
    assert not torch.equal(seen[-1], ids)


def test_the_plan_says_what_becomes_of_padding():
    assert hidden_states.plan_for(build("recurrent_gemma")).padding is Padding.BEHIND
    assert hidden_states.plan_for(build("reformer")).padding is Padding.LEFT_OUT


def test_the_comparison_can_fail(monkeypatch):
    model, ids = wrapped("recurrent_gemma"), tokens(0)
    monkeypatch.setattr(hidden_states.padding, "_tokens_first", lambda inputs, _prefix: (inputs, None))
    with pytest.raises(AssertionError):
        assert_rows_alone(model, ids, seeded_values(model, input_ids=ids, attention_mask=MASK))
