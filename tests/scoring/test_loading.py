"""Text, chats, and scorers that are loaded from a folder."""

import re
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.scoring.scoring_models import critic
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.errors import BodyMismatchError, FieldError, HeadError, HeadNotFoundError, LoadError, VheadError
from vhead.rollouts.encoding import Encoder, LengthLimit
from vhead.scoring.fields import FIELDS

BYTE_SHIFT = 3


@pytest.fixture
def peft():
    with warnings.catch_warnings():
        # peft reads an attribute that transformers 5 renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield pytest.importorskip("peft")


def lora(peft):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)


@pytest.fixture(scope="module")
def scorer(critic_folder):
    return Scorer.from_pretrained(critic_folder, device="cpu")


def ids_of(text):
    """ByT5's token ids, without its end-of-sequence token."""
    return [byte + BYTE_SHIFT for byte in text.encode()]


def test_text_is_the_token_ids_of_its_parts(scorer):
    text = scorer.score([Rollout("Why? ", "Because: ä.")], FIELDS)
    ids = scorer.score([Rollout(ids_of("Why? "), ids_of("Because: ä."))], FIELDS)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(text, name), getattr(ids, name))


class Bracketed:
    """A tokenizer that puts one special token before a text and one behind it."""

    chat_template = None

    def __call__(self, text, *, add_special_tokens, verbose=True):
        ids = [ord(letter) % 50 + 10 for letter in text if letter != "_"]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_text_gets_the_special_tokens_in_front_and_none_behind():
    encoded = Encoder(Bracketed(), 60, LengthLimit(None)).encode(0, Rollout("ab", "c"), "record 0")
    assert encoded.tokens.tolist() == [1, 57, 58, 59]
    assert (encoded.prompt_length, encoded.completion_length) == (3, 1)


def test_text_without_any_token():
    with pytest.raises(FieldError, match="line 4: completion: expected at least one token, got a text without any"):
        Encoder(Bracketed(), 60, LengthLimit(None)).encode(0, Rollout("ab", "__"), "line 4")


class TestChat:
    def test_the_template_s_difference_is_the_completion(self, scorer):
        chat = Rollout.from_messages(
            [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
            ]
        )
        plain = Rollout("<system>Be short.</s><user>Why?</s><assistant>", "So.</s>")
        a, b = (
            scorer.score([chat], FIELDS),
            scorer.score([Rollout(*map(tokens_of, (plain.prompt, plain.completion)))], FIELDS),
        )
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))

    def test_no_template(self):
        with pytest.raises(FieldError, match="messages: expected a tokenizer with a chat template, got one without"):
            Encoder(Bracketed(), 60, LengthLimit(None)).encode(0, CHAT, "record 0")

    def test_a_template_that_changes_the_prompt(self, critic_folder, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}: {{ messages[-1]['content'] }}")
        with pytest.raises(FieldError, match="messages: expected a chat template that leaves the prompt as it is"):
            Encoder(tokenizer, 259, LengthLimit(None)).encode(0, CHAT, "record 0")

    def test_a_template_that_refuses(self, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role here') }}")
        with pytest.raises(
            FieldError, match="messages: expected a chat that the template takes, got no system role here"
        ):
            Encoder(tokenizer, 259, LengthLimit(None)).encode(0, CHAT, "record 0")


def without(folder, copied, *parts):
    """A copy of a checkpoint without the tensors whose names hold one of these."""
    shutil.copytree(folder, copied)
    state = load_file(copied / "model.safetensors")
    kept = {name: value for name, value in state.items() if not any(part in name for part in parts)}
    assert len(kept) < len(state)
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


CHAT = Rollout.from_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def tokens_of(text):
    """As `ids_of`, with ByT5's `</s>` as one token."""
    parts = [ids_of(part) for part in text.split("</s>")]
    return [token for part in parts[:-1] for token in (*part, 1)] + parts[-1]


class TestFromPretrained:
    def test_the_saved_head_is_used(self, scorer, critic_folder):
        weights = load_file(critic_folder / "model.safetensors")
        assert torch.equal(scorer.model.v_head.summary.weight, weights["v_head.summary.weight"])

    def test_a_head_that_is_not_there_is_not_taken_for_one_without_a_head(self, plain_folder, tmp_path):
        missing = tmp_path / "nowhere.safetensors"
        with pytest.raises(HeadNotFoundError, match=re.escape(f"{missing}: ") + ".*no such file or folder"):
            Scorer.from_pretrained(plain_folder, head=missing)

    def test_a_model_without_a_head_is_an_error(self, plain_folder):
        found = re.escape(f"{plain_folder}: expected a trained value head, found none; ")
        with pytest.raises(HeadNotFoundError, match=f"{found}.*--allow-random-head"):
            Scorer.from_pretrained(plain_folder)

    def test_unless_a_random_head_is_allowed(self, plain_folder):
        scores = Scorer.from_pretrained(plain_folder, allow_random_head=True, device="cpu").score([Rollout("a", "b")])
        assert np.isfinite(scores.values).all()

    def test_a_head_from_a_file(self, scorer, plain_folder, critic_folder, tmp_path):
        head = {name: part for name, part in load_file(critic_folder / "model.safetensors").items() if "v_head" in name}
        save_file(head, tmp_path / "value_head.safetensors")
        other = Scorer.from_pretrained(plain_folder, head=tmp_path / "value_head.safetensors", device="cpu")
        records = [Rollout("a", "bcd")]
        np.testing.assert_array_equal(other.score(records).values, scorer.score(records).values)

    def test_a_head_that_does_not_fit(self, plain_folder, tmp_path):
        save_file(
            {"v_head.summary.weight": torch.randn(1, 7), "v_head.summary.bias": torch.randn(1)},
            tmp_path / "value_head.safetensors",
        )
        with pytest.raises(HeadError, match=r"\[1, 7\].*expected .*\[1, 32\]"):
            Scorer.from_pretrained(plain_folder, head=tmp_path / "value_head.safetensors")

    def test_a_file_without_a_head_is_an_error_even_if_a_random_one_is_allowed(self, plain_folder, critic_folder):
        with pytest.raises(HeadNotFoundError, match=re.escape(f"{plain_folder}: expected a trained value head")):
            Scorer.from_pretrained(critic_folder, head=plain_folder, allow_random_head=True)

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    def test_dtype_is_the_language_model_s(self, critic_folder, scorer, dtype):
        half = Scorer.from_pretrained(critic_folder, dtype=dtype, device="cpu")
        assert half.model.pretrained_model.dtype == torch.bfloat16
        assert half.model.v_head.summary.weight.dtype == torch.float32
        assert half._engine.selects_rows
        records = [Rollout("some prompt", "some completion")]
        a, b = half.score(records, FIELDS), scorer.score(records, FIELDS)
        assert a.values.dtype == np.float32
        np.testing.assert_allclose(a.values, b.values, atol=0.2)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=0.5)

    @pytest.mark.parametrize("dtype", ["float33", "nn", "int64"])
    def test_unknown_dtype(self, critic_folder, dtype):
        with pytest.raises(ValueError, match=f"dtype: expected a floating-point dtype of torch, got '{dtype}'"):
            Scorer.from_pretrained(critic_folder, dtype=dtype)

    def test_unknown_device(self, critic_folder):
        with pytest.raises(VheadError, match="device: the model cannot be moved to 'nowhere'"):
            Scorer.from_pretrained(critic_folder, device="nowhere")

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(
            VheadError, match=r"nothing: expected the folder of a model or .*, but there is no such folder"
        ):
            Scorer.from_pretrained(tmp_path / "nothing")

    def test_a_folder_that_is_no_model_s(self, tmp_path):
        with pytest.raises(LoadError, match=r"found neither config\.json nor adapter_config\.json"):
            Scorer.from_pretrained(tmp_path)

    def test_an_adapter_has_its_language_model_s_tokenizer(self, critic_folder, tmp_path, peft, caplog):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(critic_folder, peft_config=lora(peft))
        model.v_head = AutoModelForCausalLMWithValueHead.from_pretrained(critic_folder).v_head
        model.save_pretrained(tmp_path)
        scores = Scorer.from_pretrained(tmp_path, device="cpu").score([Rollout("ab", "cd")], FIELDS)
        assert "no tokenizer" not in caplog.text
        expected = Scorer(model).score([Rollout(ids_of("ab"), ids_of("cd"))], FIELDS)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(scores, name), getattr(expected, name))

    def test_a_learnt_prompt_is_refused_by_name(self, critic_folder, peft):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(critic_folder)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        with warnings.catch_warnings(action="ignore"):
            body = peft.get_peft_model(model.pretrained_model, config)
        with pytest.raises(VheadError, match=r"one with a learnt prompt \(PROMPT_TUNING\), which puts virtual tokens"):
            Scorer(AutoModelForCausalLMWithValueHead(body))

    def test_token_ids_need_no_tokenizer(self, critic_folder, tmp_path, caplog):
        for name in ("config.json", "model.safetensors"):
            shutil.copy(critic_folder / name, tmp_path)
        scorer = Scorer.from_pretrained(tmp_path, device="cpu")
        assert "no tokenizer could be loaded, so only token ids can be scored" in caplog.text
        assert len(scorer.score([Rollout([5], [6])])) == 1
        with pytest.raises(FieldError, match="prompt: expected token ids, because there is no tokenizer"):
            scorer.score([Rollout("a", "b")])

    @pytest.mark.parametrize("part", ["layers.1.", "embed_tokens", "model.norm", "layers.0.mlp.up_proj"])
    def test_layers_that_are_missing_are_never_drawn(self, critic_folder, tmp_path, part):
        copied = without(critic_folder, tmp_path / "critic", part)
        with pytest.raises(BodyMismatchError, match=f"does not hold the whole language model: .*{re.escape(part)}"):
            Scorer.from_pretrained(copied)

    def test_an_allowed_random_head_does_not_allow_random_layers(self, critic_folder, tmp_path):
        copied = without(critic_folder, tmp_path / "critic", "layers.1.", "v_head")
        with pytest.raises(BodyMismatchError, match=r"layers\.1\.input_layernorm\.weight"):
            Scorer.from_pretrained(copied, allow_random_head=True)

    @pytest.mark.parametrize("content", ['{"version": "99.0", "model": {}}', "[]", "{", '{"model": {"type": "New"}}'])
    def test_a_tokenizer_that_cannot_be_read_is_said_and_text_is_refused(
        self, critic_folder, tmp_path, caplog, content
    ):
        copied = shutil.copytree(critic_folder, tmp_path / "critic")
        (copied / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (copied / "tokenizer.json").write_text(content)
        scorer = Scorer.from_pretrained(copied, device="cpu")
        assert (
            f"{copied}: no tokenizer could be loaded, so only token ids can be scored: {copied}: cannot be loaded"
            in caplog.text
        )
        with pytest.raises(FieldError):
            scorer.score([Rollout("a", "b")])

    @pytest.mark.parametrize("change", ["empty", "of another shape", "of text"])
    def test_a_tensor_of_the_body_that_does_not_fit_is_one_line(self, critic_folder, tmp_path, change):
        copied = shutil.copytree(critic_folder, tmp_path / "critic")
        state = load_file(copied / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        weight = state[name]
        state[name] = {"empty": weight[:0], "of another shape": weight.T, "of text": weight.to(torch.uint8)}[change]
        save_file({key: value.contiguous() for key, value in state.items()}, copied / "model.safetensors")
        try:
            Scorer.from_pretrained(copied)
        except VheadError as error:
            assert str(copied) in str(error)  # noqa: PT017, other releases convert integers
            assert "\n" not in str(error)  # noqa: PT017

    def test_a_mistake_of_the_scorer_s_own_is_no_error_of_the_folder(self, critic_folder, monkeypatch):
        monkeypatch.setattr("vhead.scoring.scorer.Engine", None)
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            Scorer.from_pretrained(critic_folder)

    def test_an_encoder_decoder_is_refused(self):
        class Wrapper(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.v_head = critic().v_head
                config = transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
                self.pretrained_model = transformers.T5ForConditionalGeneration(config)

        with pytest.raises(
            VheadError, match="expected a decoder-only language model, got the T5ForConditionalGeneration"
        ):
            Scorer(Wrapper())


def test_a_prompt_is_tokenised_once_for_its_completions():
    asked = []

    class Counting(Bracketed):
        def __call__(self, text, **options):
            asked.append(text)
            return super().__call__(text, **options)

    encoder = Encoder(Counting(), 60, LengthLimit(None))
    asked.clear()
    encoded = [encoder.encode(at, Rollout("ab", text), "") for at, text in enumerate(("c", "d", "e"))]
    assert asked == ["abc", "a", "a", "ab", "abd", "abe"]
    assert [rollout.tokens[:3].tolist() for rollout in encoded] == [[1, 57, 58]] * 3
