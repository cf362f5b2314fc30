"""Measures what values and log-probabilities cost that are read off while generating: see README.md here."""

import argparse
from functools import partial
from statistics import median

import torch
from measure import Figures, add_options
from torch import Tensor
from workloads import qwen2

import report
from vhead import AutoModelForCausalLMWithValueHead
from vhead.benchmark.timing import Work, interleaved, quantiles

# The page in report.py says these too.
LAYERS, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 12, 8, 64, 16


def contestants(model: AutoModelForCausalLMWithValueHead) -> dict[str, Work]:
    """Plain generation, the same with statistics read off, and generation with a second pass that scores it."""
    prompts = torch.randint(0, model.config.vocab_size, (PROMPTS, PROMPT_TOKENS))
    arguments = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
    arguments |= {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    generate = partial(model.generate, prompts, **arguments)

    @torch.no_grad()
    def generate_then_score() -> Tensor:
        logits, _, values = model(generate(), logits_to_keep=NEW_TOKENS + 1)
        return values[:, PROMPT_TOKENS - 1 : -1] + logits[:, :-1].log_softmax(dim=-1)[..., 0]

    return {
        "generate": partial(model.pretrained_model.generate, prompts, **arguments),
        "values": partial(generate, output_values=True),
        "values, logprobs": partial(generate, output_values=True, output_logprobs=True),
        "values, logprobs, entropy": partial(generate, output_values=True, output_logprobs=True, output_entropy=True),
        "generate, then forward": generate_then_score,
    }


def added(times: dict[str, list[float]], name: str) -> float:
    """The median over the rounds of what a contestant takes beyond plain generation in the same round."""
    return median(own / plain for own, plain in zip(times[name], times["generate"], strict=True)) - 1


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "generation", rounds=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLMWithValueHead(qwen2(LAYERS))
    figures = Figures(options)
    times = interleaved(contestants(model), options.rounds)
    figures.add("times", ({"implementation": n, **quantiles(t), "added": added(times, n)} for n, t in times.items()))
    figures.close(report.generation)


if __name__ == "__main__":
    _main()
