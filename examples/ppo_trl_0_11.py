"""Trains with PPO in trl 0.11: the old `PPOTrainer`, vhead's class as the policy, and a scorer as the reward model.

The policy learns to write text that the demo model's value head takes for natural.

    pip install vhead 'trl==0.11.4' 'transformers==4.45.2' 'numpy<2' 'pyarrow==17.0.0'
    python examples/ppo_trl_0_11.py
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

import vhead.compat.trl
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer, create_reference_model
from vhead.demo import demo_model_path
from vhead.demo.rollouts import read_demo_rollouts

# The trainer takes nothing but instances of TRL's class. After this call, TRL's name leads to vhead's class.
vhead.compat.trl.install()

from trl import PPOConfig, PPOTrainer  # noqa: E402

PROMPT_LENGTH, RESPONSE_LENGTH, BATCH = 32, 24, 32


def main() -> None:
    """Trains the policy, and saves it with its value head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("ppo-policy"))
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path(), padding_side="left")
    prompts = sorted({rollout.prompt for rollout in read_demo_rollouts()})
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"][-PROMPT_LENGTH:] for prompt in prompts]
    queries = [torch.tensor(ids[i % len(ids)]) for i in range(BATCH)]

    policy = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path()).float()
    reward_model = Scorer.from_pretrained(demo_model_path())
    config = PPOConfig(batch_size=BATCH, mini_batch_size=BATCH, learning_rate=3e-4, seed=0)
    trainer = PPOTrainer(config, policy, create_reference_model(policy), tokenizer)

    sampling = {
        "max_new_tokens": RESPONSE_LENGTH,
        "do_sample": True,
        "top_k": 0,
        "pad_token_id": tokenizer.pad_token_id,
    }
    rewards = []
    for _ in range(arguments.updates):
        responses = trainer.generate(queries, return_prompt=False, **sampling)
        scores = reward_model.score([Rollout(q.tolist(), r.tolist()) for q, r in zip(queries, responses, strict=True)])
        trainer.step(queries, responses, [torch.tensor(score.reward) for score in scores])
        rewards.append(sum(score.reward for score in scores) / BATCH)
    print("reward before each update:", " ".join(f"{reward:.2f}" for reward in rewards))

    trainer.save_pretrained(str(arguments.output))
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(arguments.output)
    print("saved; head read from", loaded.head_source)


if __name__ == "__main__":
    main()
