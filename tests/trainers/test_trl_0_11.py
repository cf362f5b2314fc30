"""TRL 0.11's PPOTrainer, which has the class as its one way in, trains this package's class as it trains TRL's own.

Runs where TRL is older than 0.12: `python tools/versions/run.py oldest`.
"""

import contextlib
import copy
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from transformers import T5Config, T5ForConditionalGeneration

import vhead
import vhead.compat.trl
from tests.trainers.toy_task import PROMPTS, language_model, share_of_ascii, tokenizer

# What TRL and its contemporaries warn of is not this package's.
pytestmark = pytest.mark.filterwarnings("ignore")

THEIRS = trl.AutoModelForCausalLMWithValueHead
THEIRS_SEQ2SEQ = trl.AutoModelForSeq2SeqLMWithValueHead


def wrapped(wrapper=vhead.AutoModelForCausalLMWithValueHead, body=None):
    """A head of the same weights whichever class it is of; no dropout, whose masks are the classes' own."""
    model = wrapper.from_pretrained(language_model() if body is None else body, summary_dropout_prob=0.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.v_head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def trainer(model, reference=None, batch=8, **arguments):
    config = trl.PPOConfig(
        batch_size=batch, mini_batch_size=batch, learning_rate=0.01, ppo_epochs=4, seed=1, **arguments
    )
    return trl.PPOTrainer(config, model, reference, tokenizer())


def rollouts(batch):
    generator = torch.Generator().manual_seed(2)
    words = tokenizer()
    queries = [torch.tensor(words(PROMPTS[i % 4], add_special_tokens=False)["input_ids"]) for i in range(batch)]
    responses = [torch.randint(3, 259, (4 + i % 3,), generator=generator) for i in range(batch)]
    return queries, responses, [share_of_ascii(response) for response in responses]


def train_two_steps(model, reference=None, **arguments):
    is_ours = isinstance(model, vhead.PreTrainedModelWrapper)
    assert is_ours or type(model).__module__.startswith("trl.")
    with vhead.compat.trl.install() if is_ours else contextlib.nullcontext():
        ppo = trainer(model, reference, **arguments)
        np.random.seed(4)  # TRL shuffles its minibatches with it.
        return [ppo.step(*rollouts(8)) for _ in range(2)]


FIGURES = [
    "ppo/loss/total",
    "ppo/loss/policy",
    "ppo/loss/value",
    "ppo/mean_non_score_reward",
    "ppo/val/mean",
    "objective/kl",
]


def assert_same_training(ours, theirs, ours_stats, theirs_stats):
    for mine, other in zip(ours_stats, theirs_stats, strict=True):
        for name in FIGURES:
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3, msg=name)


def test_two_steps_give_what_trls_class_gives():
    ours, theirs, untouched = wrapped(), wrapped(THEIRS), wrapped()
    assert_same_training(ours, theirs, train_two_steps(ours), train_two_steps(theirs))
    for (name, before), after in zip(untouched.named_parameters(), ours.parameters(), strict=True):
        assert (before - after).abs().max() > 0.005, name


def test_the_two_classes_are_two():
    assert THEIRS.__module__.startswith("trl.")
    assert not issubclass(THEIRS, vhead.PreTrainedModelWrapper)
    with pytest.raises(ValueError, match="model must be a PreTrainedModelWrapper"):
        trainer(wrapped())


def test_another_head_trains_otherwise():
    ours, other = wrapped(), wrapped()
    with torch.no_grad():
        other.v_head.summary.bias.add_(0.5)
    with pytest.raises(AssertionError):
        assert_same_training(ours, other, train_two_steps(ours), train_two_steps(other))


def test_the_reward_rises():
    with vhead.compat.trl.install():
        ppo = trainer(wrapped(), batch=32, init_kl_coef=0.0)
    queries = rollouts(32)[0]
    rewards = []
    torch.manual_seed(0)
    for _ in range(8):
        responses = ppo.generate(
            queries, return_prompt=False, max_new_tokens=4, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=-1
        )
        scores = [share_of_ascii(response) for response in responses]
        rewards.append(float(torch.stack(scores).mean()))
        ppo.step(queries, responses, scores)
    assert rewards[-1] > rewards[0] + 0.2, rewards


def with_lora():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    torch.manual_seed(6)
    return peft.get_peft_model(language_model(), lora)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_lora(checkpointing):
    ours, theirs = wrapped(body=with_lora()), wrapped(THEIRS, with_lora())
    before = copy.deepcopy(ours)
    arguments = {"gradient_checkpointing": checkpointing}
    assert_same_training(ours, theirs, train_two_steps(ours, **arguments), train_two_steps(theirs, **arguments))
    moved = {name for (name, a), b in zip(ours.named_parameters(), before.parameters(), strict=True) if not a.equal(b)}
    assert moved == {name for name, _ in ours.named_parameters() if "lora_" in name or "v_head" in name}


def test_with_gradient_checkpointing():
    ours, theirs = wrapped(), wrapped(THEIRS)
    arguments = {"gradient_checkpointing": True}
    assert_same_training(ours, theirs, train_two_steps(ours, **arguments), train_two_steps(theirs, **arguments))


@pytest.mark.parametrize("shared_layers", [None, 1])
def test_with_a_reference_model(shared_layers):
    from trl.models.modeling_base import create_reference_model as trls

    ours, theirs = wrapped(), wrapped(THEIRS)
    reference = vhead.create_reference_model(ours, num_shared_layers=shared_layers)
    before = copy.deepcopy(reference)
    ours_stats = train_two_steps(ours, reference)
    theirs_stats = train_two_steps(theirs, trls(theirs, num_shared_layers=shared_layers))
    assert_same_training(ours, theirs, ours_stats, theirs_stats)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), reference.parameters(), strict=True))


def encoder_decoder():
    torch.manual_seed(8)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"vocab_size": 384, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(dropout_rate=0.0, **sizes, **tokens)).eval()


def test_an_encoder_decoder():
    ours = wrapped(vhead.AutoModelForSeq2SeqLMWithValueHead, encoder_decoder())
    theirs = wrapped(THEIRS_SEQ2SEQ, encoder_decoder())
    assert_same_training(ours, theirs, train_two_steps(ours), train_two_steps(theirs))


def test_what_the_trainer_saves_loads_in_both(tmp_path):
    model = wrapped()
    with vhead.compat.trl.install():
        ppo = trainer(model)
    ppo.step(*rollouts(8))
    ppo.save_pretrained(str(tmp_path))
    inputs = {"input_ids": torch.randint(3, 259, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with torch.no_grad():
        expected = model(**inputs)
        for wrapper in (vhead.AutoModelForCausalLMWithValueHead, THEIRS):
            logits, _, values = wrapper.from_pretrained(str(tmp_path)).eval()(**inputs)
            torch.testing.assert_close(values, expected.value, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[2] / "examples" / "ppo_trl_0_11.py"
    monkeypatch.setattr(sys, "argv", [example.name, "--updates", "1", "--output", str(tmp_path / "policy")])
    try:
        runpy.run_path(str(example), run_name="__main__")
    finally:
        vhead.compat.trl.uninstall()
    assert "saved; head read from" in capsys.readouterr().out
    loaded = vhead.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy")
    assert loaded.head_source is not None
