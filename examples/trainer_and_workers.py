"""A trainer that publishes its weights, and two workers that score with them.

The trainer changes the value head step by step, as PPO's value loss does, and publishes after each step. The workers
score rollouts all the while. Between two batches they take over what has been published, and each score says with
which step's weights it was computed.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.sync import Publisher

PROCESSES = multiprocessing.get_context("spawn")


def rollouts(count: int) -> list[Rollout]:
    """Rollouts of random tokens; yours come from your policy."""
    generator = torch.Generator().manual_seed(0)
    return [Rollout(*torch.randint(200, (2, 16), generator=generator).tolist()) for _ in range(count)]


def train(directory: Path, steps: int) -> None:
    """Updates the value head towards returns, and publishes it after each step."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path())
    optimizer = torch.optim.AdamW(model.v_head.parameters(), lr=1e-2)
    publisher = Publisher(directory, parts=("head",))
    tokens = torch.tensor([[*rollout.prompt, *rollout.completion] for rollout in rollouts(4)])
    returns = torch.linspace(-1, 1, 4)[:, None].expand(-1, tokens.shape[1])
    for step in range(1, steps + 1):
        loss = (model.values(tokens) - returns).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        began = time.perf_counter()
        publisher.publish(model, step=step, metadata={"loss": loss.item()})
        print(
            f"trainer: step {step}, loss {loss.item():.3f}, published in {1e3 * (time.perf_counter() - began):.1f} ms"
        )


def work(name: str, directory: Path, last: int) -> None:
    """Scores rollouts with the newest weights until the last step's have come."""
    scorer = Scorer.from_pretrained(demo_model_path(), follow=directory, min_step=1, patience=120)
    seen: Counter[int] = Counter()
    began = time.perf_counter()
    while last not in seen:
        seen.update(scorer.score(rollouts(8), returns=("values",)).weights_step.tolist())
    rate = seen.total() / (time.perf_counter() - began)
    print(f"{name}: {rate:.0f} rollouts/s, by step {dict(sorted(seen.items()))}", flush=True)


def main() -> None:
    """Starts the trainer and the workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to publish; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.directory or Path(folder)
        workers = [
            PROCESSES.Process(target=work, args=(f"worker {number}", directory, arguments.steps)) for number in (1, 2)
        ]
        for process in workers:
            process.start()
        train(directory, arguments.steps)
        for process in workers:
            process.join()
        if any(process.exitcode for process in workers):
            raise SystemExit("a worker failed")


if __name__ == "__main__":
    main()
