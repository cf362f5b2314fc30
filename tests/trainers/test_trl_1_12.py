"""The last PPOTrainer that TRL had takes a model with a value head as policy, as value model, and as both in one."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.trainers.toy_task import PROMPTS, AsciiReward, language_model, tokenizer
from vhead import AutoModelForCausalLMWithValueHead

pytestmark = [
    # The peers' own deprecations: TRL's arguments, and how it calls `generate`.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

RESPONSE = 4


def with_value_head(**arguments):
    torch.manual_seed(5)
    return AutoModelForCausalLMWithValueHead(language_model(), summary_dropout_prob=0.0, **arguments)


def plain_trainer():
    from trl.experimental.ppo import PPOTrainer

    return PPOTrainer


def saving_trainer():
    class Trainer(plain_trainer()):
        # The base class saves a state dict without its configuration of whatever is not a PreTrainedModel.
        def _save(self, output_dir=None, state_dict=None):
            self.model.save_pretrained(output_dir, state_dict=state_dict)

    return Trainer


def trainer(folder, policy, value_model, *, updates=2, batch=8, trainer_class=None, **arguments):
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig

    config = PPOConfig(
        output_dir=str(folder),
        total_episodes=updates * batch,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=10,
        response_length=RESPONSE,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        kl_coef=0.0,
        temperature=1.0,
        local_rollout_forward_batch_size=batch,
        num_sample_generations=0,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
    )
    words = tokenizer()
    prompts = Dataset.from_list([{"input_ids": words(p, add_special_tokens=False)["input_ids"]} for p in 8 * PROMPTS])
    trainer_class = trainer_class or saving_trainer()
    return trainer_class(
        config, words, policy, None, AsciiReward(RESPONSE), train_dataset=prompts, value_model=value_model, **arguments
    )


def unmoved(before, after):
    before, after = dict(before.named_parameters()), dict(after.named_parameters())
    assert before.keys() == after.keys()
    return [name for name in before if torch.equal(before[name], after[name])]


def rewards(finished):
    return [entry["objective/scores"] for entry in finished.state.log_history]


def test_one_object_is_policy_and_value_model(tmp_path):
    model = with_value_head()
    before = copy.deepcopy(model)
    ppo = trainer(tmp_path, model, model, updates=6, batch=32)
    ppo.train()
    assert unmoved(before, model) == []
    assert unmoved(before, ppo.ref_model) == [name for name, _ in before.named_parameters()]
    first, *_, last = rewards(ppo)
    assert last > first + 0.2

    ppo.save_model(tmp_path / "policy")
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy")
    assert unmoved(model, loaded) == [name for name, _ in model.named_parameters()]
    assert loaded.head_source is not None


def test_the_native_form_is_policy_and_value_model_and_saves_by_itself(tmp_path):
    from transformers import AutoModel

    from vhead.pretrained import ValueHeadModel

    model = ValueHeadModel.from_wrapper(with_value_head())
    before = copy.deepcopy(model)
    ppo = trainer(tmp_path, model, model, trainer_class=plain_trainer())
    ppo.train()
    assert unmoved(before, model) == []
    ppo.save_model(tmp_path / "policy")
    loaded = AutoModel.from_pretrained(tmp_path / "policy")
    assert type(loaded) is ValueHeadModel
    assert unmoved(model, loaded) == [name for name, _ in model.named_parameters()]


def test_as_policy_beside_another_value_model(tmp_path):
    from transformers import AutoModelForSequenceClassification

    policy, config = with_value_head(), copy.deepcopy(language_model().config)
    config.num_labels = 1
    value_model = AutoModelForSequenceClassification.from_config(config)
    before, value_before = copy.deepcopy(policy), copy.deepcopy(value_model)
    trainer(tmp_path, policy, value_model).train()
    # Nothing asks this object for values, so its head learns nothing.
    assert unmoved(before, policy) == ["v_head.summary.weight", "v_head.summary.bias"]
    assert unmoved(value_before, value_model) == []


def test_as_value_model_of_a_plain_policy(tmp_path):
    policy, value_model = language_model(), with_value_head()
    before, policy_before = copy.deepcopy(value_model), copy.deepcopy(policy)
    ppo = trainer(tmp_path, policy, value_model)
    ppo.train()
    assert unmoved(before, value_model) == []
    assert unmoved(policy_before, policy) == []


def test_values_in_the_trainer_are_the_models_own(tmp_path):
    from trl.experimental.utils import get_reward

    model = with_value_head()
    wrapper = trainer(tmp_path, model, model).model
    tokens = torch.randint(3, 259, (2, 12))
    with torch.no_grad():
        output, values = wrapper(input_ids=tokens, output_hidden_states=True, return_dict=True)
        assert torch.equal(values.squeeze(-1), model(tokens).value)
        assert torch.equal(output.logits, model(tokens).logits)
        assert torch.equal(get_reward(model, tokens, 0, 4)[0].squeeze(-1), model(tokens).value)


def test_with_gradient_checkpointing(tmp_path):
    model = with_value_head()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = copy.deepcopy(model)
    trainer(tmp_path, model, model, updates=1).train()
    assert unmoved(before, model) == []
    assert model.is_gradient_checkpointing is True


def test_with_an_adapter_inside(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    body = peft.get_peft_model(language_model(), lora)
    torch.manual_seed(5)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body, summary_dropout_prob=0.0)
    before = copy.deepcopy(model)
    trainer(tmp_path, model, model).train()
    moved = set(dict(model.named_parameters())) - set(unmoved(before, model))
    assert moved == {name for name, _ in model.named_parameters() if "lora_" in name or "v_head" in name}


@pytest.mark.filterwarnings("ignore")
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[2] / "examples" / "ppo_trl_1_12.py"
    monkeypatch.setattr(sys, "argv", [example.name, "--updates", "1", "--output", str(tmp_path / "policy")])
    runpy.run_path(str(example), run_name="__main__")
    assert "saved; head read from" in capsys.readouterr().out
    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy").head_source is not None
