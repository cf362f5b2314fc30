"""Measures what values and log-probabilities cost that are read off while generating: see README.md here."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from measure import interleaved, load_average, provenance, quantiles
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from vhead import AutoModelForCausalLMWithValueHead

RESULTS = Path(__file__).parent / "results" / "generation.json"
# The shape of Qwen2-0.5B with half of its layers, random weights.
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "num_hidden_layers": 12,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "tie_word_embeddings": True,
}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 16
GOAL = 0.03

Contestant = Callable[[], object]


def build() -> AutoModelForCausalLMWithValueHead:
    """The model, in float32 and evaluation mode."""
    torch.manual_seed(0)
    return AutoModelForCausalLMWithValueHead(Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval())


def contestants(model: AutoModelForCausalLMWithValueHead) -> dict[str, Contestant]:
    """Plain generation, the same with statistics read off, and generation with a second pass that scores it."""
    prompts = torch.randint(0, SHAPE["vocab_size"], (PROMPTS, PROMPT_TOKENS))
    arguments = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
    arguments |= {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    generate = partial(model.generate, prompts, **arguments)
    return {
        "generate": partial(model.pretrained_model.generate, prompts, **arguments),
        "values": partial(generate, output_values=True),
        "values, logprobs": partial(generate, output_values=True, output_logprobs=True),
        "values, logprobs, entropy": partial(generate, output_values=True, output_logprobs=True, output_entropy=True),
        "generate, then forward": partial(_generate_then_score, model, partial(generate)),
    }


@torch.no_grad()
def _generate_then_score(model: AutoModelForCausalLMWithValueHead, generate: Callable[[], Tensor]) -> Tensor:
    sequences = generate()
    logits, _, values = model(sequences, logits_to_keep=NEW_TOKENS + 1)
    return values[:, PROMPT_TOKENS - 1 : -1] + logits[:, :-1].log_softmax(dim=-1)[..., 0]


def added(times: dict[str, list[float]], name: str) -> float:
    """The median over the rounds of what a contestant takes beyond plain generation in the same round."""
    return median(own / plain for own, plain in zip(times[name], times["generate"], strict=True)) - 1


def report(document: dict[str, object]) -> str:
    """The figures as a table."""
    p = document["provenance"]
    lines = [
        "<!-- Written by benchmarks/generation.py. -->",
        f"{p['cpu']}, {p['cores']} cores, {p['torch_threads']} threads; torch {p['torch']}; commit "
        f"{str(p['commit'])[:12]}, {p['date']}; {p['rounds']} rounds; load average {p['load_before']:.1f} before, "
        f"{p['load_after']:.1f} after.",
        "",
        f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens each, greedy; the shape of Qwen2-0.5B "
        "with 12 layers, float32, random weights.",
        "",
        "| | median, s | beyond plain generation |",
        "|---|---|---|",
    ]
    for row in document["times"]:
        lines.append(f"| {row['implementation']} | {row['p50_us'] / 1e6:.3f} | {row['added']:+.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = provenance(options.threads, options.rounds) | {"load_before": load_average()}
    times = interleaved(contestants(build()), options.rounds)
    source["load_after"] = load_average()
    rows = [{"implementation": name, **quantiles(t), "added": added(times, name)} for name, t in times.items()]
    document = {"provenance": source, "times": rows}
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(report(document))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
