"""Warms up a critic: fits its head to rollouts that are there already, and compares it with a fresh one.

The bundled rollouts are passages of text, some of which were corrupted. Here each corrupted byte costs the model a
reward, and the value of a token is the discounted sum of what is still to come. The head is fitted in one pass on some
passages. The others, which it never saw, are for judging: by a fresh head, by the fitted one, and by a fresh one after
some steps of Adam on the passages that the fitted one had.

    pip install vhead
    python examples/critic_warm_start.py
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

import vhead
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.demo.rollouts import DemoRollout, read_demo_rollouts

# The demo model reads bytes; its first three ids are special tokens.
FIRST_BYTE = 3
GAMMA = 0.95
HELD_OUT_TOPICS = 3


def as_rollout(record: DemoRollout) -> Rollout:
    """Makes token ids of a record."""
    prompt, completion = (np.frombuffer(text.encode(), np.uint8) for text in (record.prompt, record.completion))
    return Rollout(prompt.astype(np.int64) + FIRST_BYTE, completion.astype(np.int64) + FIRST_BYTE, id=record.id)


def returns_of(record: DemoRollout) -> NDArray[np.float32]:
    """Computes the return of each token, where each corrupted byte is rewarded by -1."""
    start, stop = (len(record.completion[:place].encode()) for place in record.span)
    rewards = np.zeros(len(record.completion.encode()), np.float32)
    rewards[start:stop] = -1.0
    discounted: NDArray[np.float32] = vhead.returns.discounted(rewards, gamma=GAMMA)
    return discounted


def explained(model: torch.nn.Module, rollouts: Sequence[Rollout], targets: Sequence[NDArray[np.float32]]) -> float:
    """Scores the rollouts and says how much of their returns' variance the values explain."""
    values = Scorer(model).score(rollouts, returns=("values",)).values
    return vhead.returns.explained_variance(values, np.concatenate(targets))


def train(
    model: AutoModelForCausalLMWithValueHead,
    rollouts: Sequence[Rollout],
    targets: Sequence[NDArray[np.float32]],
    steps: int,
) -> None:
    """Trains the head alone by Adam, a step for each pass over all rollouts."""
    optimiser = torch.optim.Adam(model.v_head.parameters(), lr=1e-2)
    inputs = [torch.from_numpy(np.concatenate([r.prompt, r.completion]))[None] for r in rollouts]
    with torch.no_grad():
        states = [model.pretrained_model.model(tokens).last_hidden_state[0] for tokens in inputs]
    rows = torch.cat([own[len(r.prompt) - 1 : -1] for own, r in zip(states, rollouts, strict=True)])
    wanted = torch.from_numpy(np.concatenate(targets))
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (model.v_head(rows).squeeze(-1) - wanted).square().mean()
        loss.backward()
        optimiser.step()


def fresh() -> AutoModelForCausalLMWithValueHead:
    """Loads the demo model with a head of zeros, as one that was never trained."""
    body = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path()).pretrained_model.float()
    return AutoModelForCausalLMWithValueHead.from_pretrained(body, v_head_init_strategy="zeros").eval()


def main() -> None:
    """Fits, trains, compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of Adam for the head that is not fitted")
    steps: int = parser.parse_args().steps

    records = read_demo_rollouts()
    held_out = sorted({record.topic for record in records})[:HELD_OUT_TOPICS]
    seen = [record for record in records if record.topic not in held_out]
    unseen = [record for record in records if record.topic in held_out]
    rollouts, targets = [as_rollout(record) for record in seen], [returns_of(record) for record in seen]
    others, wanted = [as_rollout(record) for record in unseen], [returns_of(record) for record in unseen]

    critic = fresh()
    print(f"explained variance on {len(others)} rollouts of other passages")
    print(f"  fresh head               {explained(critic, others, wanted):+.3f}")
    fitted = vhead.fit(critic, rollouts, targets, target="returns", folds=3)
    critic.v_head.load(fitted.head)
    print(f"  fitted head              {explained(critic, others, wanted):+.3f}")
    print(f"    as its folds promised  {fitted.metrics['explained_variance']:+.3f}")
    trained = fresh()
    train(trained, rollouts, targets, steps)
    print(f"  {steps:>4} steps of Adam       {explained(trained, others, wanted):+.3f}")
    critic.save_pretrained("warm_critic")
    print("saved in warm_critic")


if __name__ == "__main__":
    main()
