"""Measures `vhead.fit` beside scoring the same rollouts, and how its memory grows: see README.md.

python benchmarks/fitting.py                    # 2,000 and 10^4 completion tokens, memory up to 10^6
python benchmarks/fitting.py --quick            # two rounds, memory up to 10^5, in less than three minutes
python benchmarks/fitting.py --prompts 200      # 10^5 completion tokens

README.md here says of what.
"""

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
from vhead.benchmark.timing import Work, clocked, load_average, turns
from vhead.fitting.fitting import DEFAULT_FOLDS

LAYERS, PROMPTS, COMPLETIONS = 4, (4, 20), 8
SIZES = (10**4, 10**5, 10**6)
BYTES, PROMPT, COMPLETION = 256, 10, 100


def _times(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds of scoring values alone and of fitting, in turns."""
    torch.set_num_threads(options.threads)
    for dtype in (torch.float32, torch.bfloat16):
        scorer = Scorer(AutoModelForCausalLMWithValueHead.from_pretrained(qwen2(LAYERS).to(dtype)).eval())
        for prompts in options.prompts:
            rollouts, before = log_normal(prompts, COMPLETIONS), load_average()
            rewards = np.random.default_rng(0).normal(size=len(rollouts)).tolist()
            works: dict[str, Work] = {
                "score": partial(scorer.score, rollouts, ("values",)),
                "fit": partial(vhead.fit, scorer, rollouts, rewards, folds=min(prompts, DEFAULT_FOLDS)),
            }
            about = {"dtype": str(dtype), "tokens": sum(len(each.completion) for each in rollouts)}
            for number, name in turns(works, options.rounds):
                row = {"round": number, "implementation": name, **about, **clocked(works[name])}
                print("{dtype}, {tokens:,} tokens, {implementation}: {wall_s:.2f} s".format(**row), flush=True)
                yield row | {"load_before": before, "load_after": load_average()}


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
    for tokens in SIZES[: 2 if options.quick else None]:
        yield {"tokens": tokens, "bytes": in_fresh_process(peak, tokens, options.threads)}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "fitting", rounds=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="of rollouts, for each size")
    parser.add_argument("--quick", action="store_true", help="two rounds, and memory up to 10^5 tokens")
    options = parser.parse_args()
    options.rounds = 2 if options.quick else options.rounds
    figures = Figures(options, layers=LAYERS, completions=COMPLETIONS)
    figures.add("times", _times(options))
    figures.add("memory", _peaks(options))
    figures.close(report.fitting)


if __name__ == "__main__":
    _main()
