"""Trains a critic as verl does: packed rows, values at index 2 of the output, GAE, and the clipped value loss.

verl builds its critic from a loaded language model and calls it with one row of all tokens. There is no padding and no
mask, and positions start again with each rollout. Here a fresh head on the demo model learns from the demo's rollouts.
transformers keeps packed rollouts apart by their positions, with flash attention and, on recent releases, with any.

    pip install vhead 'transformers>=4.53' 'torch>=2.6'
    python examples/verl_critic.py
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.demo.rollouts import read_demo_rollouts

GAMMA, LAMBDA, CLIP = 1.0, 0.95, 0.5
TOKEN_BUDGET, EPOCHS = 512, 5


class Critic(AutoModelForCausalLMWithValueHead):
    """The class with torch's own names in its state dict, which verl's sharded checkpoints use."""

    state_dict = nn.Module.state_dict


def packed_values(critic: Critic, rows: list[Tensor]) -> list[Tensor]:
    """Computes the values `[T]` of each row of tokens from one packed row `[1, nnz]`."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    output = critic(input_ids=torch.cat(rows)[None], attention_mask=None, position_ids=positions, use_cache=False)
    return list(output[2].squeeze(0).split([len(row) for row in rows]))


def micro_batches(rows: list[Tensor]) -> list[list[Tensor]]:
    """Groups the rows in order, at most `TOKEN_BUDGET` tokens to a group unless a single row has more."""
    groups: list[list[Tensor]] = [[]]
    for row in rows:
        if groups[-1] and sum(map(len, groups[-1])) + len(row) > TOKEN_BUDGET:
            groups.append([])
        groups[-1].append(row)
    return groups


def advantages(values: Tensor, reward: float) -> Tensor:
    """Computes generalised advantages `[C]` from values `[C]` and a reward for the last token."""
    result, following = torch.zeros_like(values), 0.0
    for t in reversed(range(len(values))):
        is_last = t == len(values) - 1
        delta = (reward if is_last else GAMMA * values[t + 1]) - values[t]
        following = delta + (0.0 if is_last else GAMMA * LAMBDA * following)
        result[t] = following
    return result


def main() -> None:
    """Trains the critic, and saves it with the names of a checkpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("critic"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    rollouts = [
        (tokenizer(r.prompt, add_special_tokens=False)["input_ids"], tokenizer(r.completion)["input_ids"][:-1])
        for r in read_demo_rollouts()
    ]
    rows = [torch.tensor(prompt + completion) for prompt, completion in rollouts]
    scores = Scorer.from_pretrained(demo_model_path()).score([Rollout(*rollout) for rollout in rollouts])
    rewards = [score.reward for score in scores]

    body = AutoModelForCausalLM.from_pretrained(demo_model_path()).float().requires_grad_(requires_grad=False)
    body.config.summary_dropout_prob = 0.0
    critic = Critic.from_pretrained(body)
    with torch.no_grad():
        # Packing keeps the rollouts apart, so the second one has the values that it has alone.
        alone = critic.values(rows[1][None])[0]
        torch.testing.assert_close(packed_values(critic, rows[:2])[1], alone, rtol=1e-3, atol=1e-3)

    optimizer = torch.optim.AdamW(critic.v_head.parameters(), lr=3e-2)
    # The value of the state before token t is at the position that predicts t, which is one to the left.
    states = [slice(len(prompt) - 1, len(prompt) + len(completion) - 1) for prompt, completion in rollouts]

    def predicted() -> Tensor:
        """Computes the values of all states that completions start from or pass through, one after the other."""
        values = [values for group in micro_batches(rows) for values in packed_values(critic, group)]
        return torch.cat([row[state] for row, state in zip(values, states, strict=True)])

    lengths = [len(completion) for _, completion in rollouts]
    losses = []
    for _ in range(arguments.steps):
        with torch.no_grad():
            old = predicted()
            gains = [advantages(row, reward) for row, reward in zip(old.split(lengths), rewards, strict=True)]
            targets = torch.cat(gains) + old
        for _ in range(EPOCHS):
            values = predicted()
            clipped = values.clamp(old - CLIP, old + CLIP)
            loss = 0.5 * torch.maximum((values - targets).square(), (clipped - targets).square()).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    print(f"value loss: {losses[0]:.2f} at first, {losses[-1]:.2f} at last")

    # A sharded run gathers weights under the module's own names, and a checkpoint has transformers' names.
    critic.save_pretrained(arguments.output, state_dict=critic.state_dict())
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(arguments.output)
    print("saved; head read from", loaded.head_source)


if __name__ == "__main__":
    main()
