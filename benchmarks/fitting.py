"""Measures `vhead.fit` beside scoring the same rollouts, and how its memory grows: see README.md."""

import argparse
from collections.abc import Iterator
from functools import partial

import numpy as np
import report
import torch
from measure import Figures, add_options, in_fresh_process, memory
from workloads import log_normal, qwen2, small_llama

import vhead
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.benchmark.document import Row
from vhead.benchmark.timing import Work, interleaved, load_average

LAYERS, PROMPTS, COMPLETIONS = 4, 4, 8
SIZES = (10**4, 10**5, 10**6)
BYTES, PROMPT, COMPLETION = 256, 10, 100


def _times(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds of scoring values alone and of fitting, in turns."""
    torch.set_num_threads(options.threads)
    rollouts = log_normal(PROMPTS, COMPLETIONS)
    rewards = np.random.default_rng(0).normal(size=len(rollouts)).tolist()
    for dtype in (torch.float32, torch.bfloat16):
        scorer = Scorer(AutoModelForCausalLMWithValueHead.from_pretrained(qwen2(LAYERS).to(dtype)).eval())
        before = load_average()
        works: dict[str, Work] = {
            "score": partial(scorer.score, rollouts, ("values",)),
            "fit": partial(vhead.fit, scorer, rollouts, rewards, folds=PROMPTS),
        }
        for name, seconds in interleaved(works, options.rounds).items():
            about = {"load_before": before, "load_after": load_average()}
            yield {"implementation": name, "dtype": str(dtype), "seconds": seconds, **about}


def drawn(tokens: int) -> Iterator[Rollout]:
    """Rollouts with so many completion tokens, made one by one."""
    rng = np.random.default_rng(0)
    for _ in range(tokens // COMPLETION):
        yield Rollout(rng.integers(0, BYTES, PROMPT), rng.integers(0, BYTES, COMPLETION))


def peak(tokens: int, threads: int) -> int:
    """Peak bytes of a process that fits a head of a small model to so many tokens."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(1)
    scorer = Scorer(AutoModelForCausalLMWithValueHead.from_pretrained(small_llama(BYTES)).eval())
    vhead.fit(scorer, drawn(tokens), (float(rng.normal()) for _ in range(tokens // COMPLETION)))
    return memory("VmHWM")


def _peaks(options: argparse.Namespace) -> Iterator[Row]:
    for tokens in SIZES:
        yield {"tokens": tokens, "bytes": in_fresh_process(peak, tokens, options.threads)}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "fitting", rounds=5)
    options = parser.parse_args()
    figures = Figures(options, layers=LAYERS, prompts=PROMPTS, completions=COMPLETIONS)
    figures.add("times", _times(options))
    figures.add("memory", _peaks(options))
    figures.close(report.fitting)


if __name__ == "__main__":
    _main()
