"""Measures what a token costs as rollouts, vocabulary, sharing of prompts and lengths grow: README.md."""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import load_average, provenance
from transformers import LlamaConfig, LlamaForCausalLM

from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer

RESULTS = Path(__file__).parent / "results" / "scoring-growth.json"
RETURNS = {"values": ("values",), "all fields": ("values", "logprobs", "entropy", "reward")}

Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """A model and a workload.

    Attributes:
        vocabulary: Of the model.
        prompts: Different prompts.
        completions: Of each prompt.
        prompt: Tokens of a prompt.
        completion: Tokens of a completion.
    """

    vocabulary: int = 32_768
    prompts: int = 8
    completions: int = 8
    prompt: int = 64
    completion: int = 64

    @property
    def tokens(self) -> int:
        """Of all rollouts, prompts counted as often as they come."""
        return self.prompts * self.completions * (self.prompt + self.completion)

    def rollouts(self) -> list[Rollout]:
        """Random token ids."""
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> torch.Tensor:
            return torch.randint(3, self.vocabulary, (count,), generator=generator)

        heads = [draw(self.prompt) for _ in range(self.prompts)]
        return [Rollout(head, draw(self.completion)) for head in heads for _ in range(self.completions)]


BASE = Case()
# What grows on each axis, in the order of the picture's panels.
AXES: dict[str, list[tuple[int, Case]]] = {
    "rollouts": [(count, replace(BASE, prompts=count // 8)) for count in (8, 16, 32, 64, 128, 256)],
    "vocabulary": [(size, replace(BASE, vocabulary=size)) for size in (1024, 4096, 16_384, 65_536, 262_144)],
    "completions per prompt": [
        (count, replace(BASE, prompts=64 // count, completions=count, prompt=192, completion=32))
        for count in (1, 2, 4, 8, 16, 32, 64)
    ],
    "completion length": [
        (length, replace(BASE, prompts=max(1, 512 // length), completion=length)) for length in (8, 32, 128, 512, 1024)
    ],
}


def scorer(vocabulary: int, threads: int) -> Scorer:
    """A Llama of 4 layers, hidden size 256, float32, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(LlamaForCausalLM(config).float())
    return Scorer(model.eval(), num_threads=threads)


def measured(rounds: int, threads: int) -> Iterator[Row]:
    """Seconds of every case for each set of fields; in a round all take turns in random order."""
    torch.set_num_threads(threads)
    turns = [(axis, at, case, label) for axis, cases in AXES.items() for at, case in cases for label in RETURNS]
    scorers = {size: scorer(size, threads) for size in sorted({case.vocabulary for _, _, case, _ in turns})}
    shuffle = random.Random(0)  # noqa: S311, not a secret
    for number in range(rounds):
        shuffle.shuffle(turns)
        for axis, at, case, label in turns:
            chosen, rollouts = scorers[case.vocabulary], case.rollouts()
            wall, processor = time.perf_counter(), time.process_time()
            chosen.score(rollouts, RETURNS[label])
            seconds = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
            yield {"round": number, "axis": axis, "at": at, "fields": label, "tokens": case.tokens, **seconds}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    source = provenance(options.threads, options.rounds) | {"load_before": load_average(), "base": asdict(BASE)}
    document: dict[str, Any] = {"provenance": source, "times": []}
    for row in measured(options.rounds, options.threads):
        document["times"].append(row)
        source["load_after"] = load_average()
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
