"""Trains with PPO in trl 1.12: one model is both policy and value model, and another one is the reward model.

The policy learns to write text that the demo model's value head takes for natural.

    pip install vhead 'trl==1.12.0'
    python examples/ppo_trl_1_12.py
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from vhead import AutoModelForCausalLMWithValueHead
from vhead.demo import demo_model_path
from vhead.demo.rollouts import read_demo_rollouts

PROMPT_LENGTH, RESPONSE_LENGTH, BATCH = 32, 24, 32


class Trainer(PPOTrainer):
    """Saves checkpoints by `save_pretrained`, since transformers saves a class that is not its own without a config."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)


def load() -> AutoModelForCausalLMWithValueHead:
    """Loads the demo model with its trained head, in float32."""
    return AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path()).float()


def main() -> None:
    """Trains the policy, and saves it with its value head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("ppo-policy"))
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path(), padding_side="left")
    prompts = sorted({rollout.prompt for rollout in read_demo_rollouts()})
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"][-PROMPT_LENGTH:] for prompt in prompts]
    policy = load()
    config = PPOConfig(
        output_dir=str(arguments.output),
        total_episodes=arguments.updates * BATCH,
        per_device_train_batch_size=BATCH,
        local_rollout_forward_batch_size=BATCH,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=4,
        response_length=RESPONSE_LENGTH,
        temperature=1.0,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        num_sample_generations=0,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        config,
        tokenizer,
        model=policy,
        value_model=policy,
        ref_model=None,
        reward_model=load(),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in ids] * BATCH),
    )
    trainer.train()
    rewards = [entry["objective/scores"] for entry in trainer.state.log_history]
    print("reward after each update:", " ".join(f"{reward:.2f}" for reward in rewards))

    trainer.save_model()
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(arguments.output)
    print("saved; head read from", loaded.head_source)


if __name__ == "__main__":
    main()
