"""The workload of the scorer's figures, and the ways of scoring it."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from trl.experimental.ppo import AutoModelForCausalLMWithValueHead as TrlModel

from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.scoring import engine
from vhead.packing.caching import PrefixCache
from vhead.packing.packing import MaskedTreePacking
from vhead.scoring.statistics import statistics_of_logits
from vhead.packing.strategies import OneByOne, PaddedBatches, Strategy

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS = 151_936, 896, 4864, 14, 2
TRL_BATCH = 8
VALUES = ("values",)
ALL_FIELDS = ("values", "logprobs", "entropy", "reward")

Score = Callable[[tuple[str, ...]], object]


def workload(prompts: int, completions: int, seed: int = 1) -> list[Rollout]:
    """Prompts of 64 to 199 random tokens, each with log-normally long completions of 8 to 256 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(64, 200, (prompts,), generator=generator)
    heads = [torch.randint(0, VOCABULARY, (int(length),), generator=generator) for length in lengths]
    rollouts = []
    for head in heads:
        for _ in range(completions):
            length = int(torch.empty(1).log_normal_(4.0, 0.7, generator=generator).clamp(8, 256))
            rollouts.append(Rollout(head, torch.randint(0, VOCABULARY, (length,), generator=generator)))
    return rollouts


def sizes(rollouts: list[Rollout]) -> dict[str, int]:
    """How many tokens there are, how many different prefixes, and how many completion tokens."""
    whole = [(*rollout.prompt.tolist(), *rollout.completion.tolist()) for rollout in rollouts]
    return {
        "rollouts": len(rollouts),
        "tokens": sum(map(len, whole)),
        "unique_tokens": len({tokens[:end] for tokens in whole for end in range(1, len(tokens) + 1)}),
        "completion_tokens": sum(len(rollout.completion) for rollout in rollouts),
    }


def language_model(layers: int) -> PreTrainedModel:
    """Qwen2-0.5B's shape with fewer layers, float32, random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).float().eval()


@dataclass(frozen=True)
class Contestant:
    """One way to score the workload.

    Attributes:
        name: What tables call it.
        make: Given the language model and the rollouts, gives what scores some fields.
        fields: Which sets of fields it is measured on.
    """

    name: str
    make: Callable[[PreTrainedModel, list[Rollout]], Score]
    fields: tuple[tuple[str, ...], ...] = (VALUES, ALL_FIELDS)


def trl_loop(body: PreTrainedModel, rollouts: list[Rollout], *, logprobs: bool = True) -> Score:
    """TRL 1.12's class on right-padded batches of 8 in input order; its forward makes the logits in any case.

    Args:
        body: The language model.
        rollouts: What is scored.
        logprobs: Whether log-probabilities are taken of the logits, as its trainers do; entropies never are.
    """
    model = TrlModel.from_pretrained(body).eval()
    batches = [_padded(rollouts[start : start + TRL_BATCH]) for start in range(0, len(rollouts), TRL_BATCH)]

    @torch.no_grad()
    def score(_fields: tuple[str, ...]) -> list[Tensor]:
        results = []
        for tokens, mask in batches:
            logits, _loss, values = model(input_ids=tokens, attention_mask=mask)
            results.append(values)
            if logprobs:
                distribution = functional.log_softmax(logits[:, :-1], dim=-1)
                results.append(distribution.gather(-1, tokens[:, 1:, None]).squeeze(-1))
        return results

    return score


def scorer(
    *, way: Callable[[engine.Body], Strategy] | None = None, batch_invariant: bool = False
) -> Callable[[PreTrainedModel, list[Rollout]], Score]:
    """`vhead.Scorer`, in the way it chooses or in this one."""

    def make(body: PreTrainedModel, rollouts: list[Rollout]) -> Score:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(body).eval()
        made = Scorer(model, batch_invariant=batch_invariant)
        if way is not None:
            own = made._engine
            own._ways = replace(own._ways, usual=way(own._body))
        return lambda fields: made.score(rollouts, fields)

    return make


def logits_of_all_rows(body: PreTrainedModel, rollouts: list[Rollout]) -> Score:
    """The scorer, without choosing rows before the language-model head, 512 rows at a time."""
    score = scorer()(body, rollouts)
    weight = body.get_output_embeddings().weight

    def all_rows(fields: tuple[str, ...]) -> None:
        with torch.no_grad():
            score(tuple(name for name in fields if name in ("values", "reward")))
            tokens = sizes(rollouts)["unique_tokens"]
            states, targets = torch.randn(tokens, HIDDEN), torch.zeros(tokens, dtype=torch.long)
            for start in range(0, tokens, 512):
                logits = functional.linear(states[start : start + 512], weight)
                rows = torch.arange(len(logits))
                statistics_of_logits(logits, rows, targets[start : start + 512], 1.0, entropy=True)

    return all_rows


def bare_gemm(body: PreTrainedModel, rollouts: list[Rollout]) -> Score:
    """Only the matrix products over unique tokens and completion rows: the machine's limit for this work."""
    count = sizes(rollouts)
    weights = [m.weight for m in body.get_submodule("model").modules() if isinstance(m, torch.nn.Linear)]
    rows = {width: torch.randn(count["unique_tokens"], width) for width in {w.shape[1] for w in weights}}
    scored = torch.randn(count["completion_tokens"], HIDDEN)
    output = body.get_output_embeddings().weight

    @torch.no_grad()
    def multiply(fields: tuple[str, ...]) -> None:
        for weight in weights:
            functional.linear(rows[weight.shape[1]], weight)
        if fields == ALL_FIELDS:
            for tile in output.split(8192):
                functional.linear(scored, tile)

    return multiply


def contestants() -> Iterator[Contestant]:
    """Everything that is measured: the peer, ourselves, what each mechanism gives, and the limit."""
    yield Contestant("vhead", scorer())
    yield Contestant("bare GEMM", bare_gemm)
    yield Contestant("trl", trl_loop, (ALL_FIELDS,))
    yield Contestant("trl, forward only", partial(trl_loop, logprobs=False), (VALUES,))
    yield Contestant("sorted batches", scorer(way=PaddedBatches))
    yield Contestant("batch-invariant", scorer(batch_invariant=True))
    yield Contestant("dense mask", scorer(way=lambda body: MaskedTreePacking(body, None)))
    yield Contestant("logits of all rows", logits_of_all_rows, (ALL_FIELDS,))
    yield Contestant("prefix cache", scorer(way=PrefixCache))
    yield Contestant("one at a time", scorer(way=OneByOne))


def _padded(rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
    rows = [torch.cat([torch.tensor(r.prompt), torch.tensor(r.completion)]) for r in rollouts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return tokens, mask
