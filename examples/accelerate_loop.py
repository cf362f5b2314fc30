"""Warms up a critic on rollouts that were collected before, in a plain accelerate loop.

The demo model writes rollouts, and its trained head gives their rewards. A fresh head on the same language model then
learns to predict the reward from every position. Run it as it is, or with `accelerate launch` on several processes.

    pip install vhead accelerate
    python examples/accelerate_loop.py
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vhead import AutoModelForCausalLMWithValueHead
from vhead.demo import demo_model_path
from vhead.demo.rollouts import read_demo_rollouts

PROMPT_LENGTH, RESPONSE_LENGTH, ROLLOUTS, BATCH = 32, 24, 128, 16


@torch.no_grad()
def collect() -> tuple[Tensor, Tensor]:
    """Collects rollouts `[N, P + C]` of the demo model, and the reward `[N]` of each."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    model = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path()).float()
    prompts = sorted({rollout.prompt for rollout in read_demo_rollouts()})
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"][-PROMPT_LENGTH:] for prompt in prompts]
    prompt_ids = torch.tensor([row for row in ids if len(row) == PROMPT_LENGTH] * ROLLOUTS)[:ROLLOUTS]
    rollouts = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=RESPONSE_LENGTH,
        min_new_tokens=RESPONSE_LENGTH,
        do_sample=True,
        temperature=1.5,
    )
    return rollouts, model.values(rollouts)[:, -1]


@torch.no_grad()
def explained_variance(critic: AutoModelForCausalLMWithValueHead, rollouts: Tensor, rewards: Tensor) -> float:
    """Says how much of the rewards' variance the values at the last token explain; 1 is all of it."""
    critic.eval()
    return 1.0 - float((rewards - critic.values(rollouts)[:, -1]).var() / rewards.var())


def main() -> None:
    """Trains the head, and saves the run's state and the critic."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("critic"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rollouts, rewards = collect()

    accelerator = Accelerator(cpu=True)
    body = AutoModelForCausalLM.from_pretrained(demo_model_path()).float()
    critic = AutoModelForCausalLMWithValueHead.from_pretrained(body.requires_grad_(requires_grad=False))
    optimizer = torch.optim.AdamW(critic.v_head.parameters(), lr=3e-2)
    dataset = torch.utils.data.TensorDataset(rollouts[: -2 * BATCH], rewards[: -2 * BATCH])
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True)
    held_out = rollouts[-2 * BATCH :], rewards[-2 * BATCH :]
    print(f"explained variance on held-out rollouts: {explained_variance(critic, *held_out):.2f} with a fresh head")

    critic, optimizer, loader = accelerator.prepare(critic, optimizer, loader)
    for _ in range(arguments.epochs):
        critic.train()
        for ids, reward in loader:
            values = critic(ids).value[:, PROMPT_LENGTH - 1 :]
            accelerator.backward((values - reward[:, None]).square().mean())
            accelerator.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(arguments.output / "state")

    critic = accelerator.unwrap_model(critic)
    print(f"explained variance on held-out rollouts: {explained_variance(critic, *held_out):.2f} with the trained one")
    critic.save_pretrained(arguments.output)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(arguments.output)
    print("saved; head read from", loaded.head_source)


if __name__ == "__main__":
    main()
