"""Measures the update: a batch of rollouts forward and backward with gradients of a policy's and a value loss.

    python benchmarks/update.py            # the whole: 12 layers, float32 and bfloat16, about an hour
    python benchmarks/update.py --quick    # one prompt, one round and fewer contestants, in less than three minutes

README.md here says who is measured.
"""

import argparse
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import report
import torch
from measure import Figures, add_options, extra_bytes
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from workloads import log_normal, qwen2, sizes

from vhead import AutoModelForCausalLMWithValueHead, Rollout, TrainingPass, freeze, losses
from vhead.benchmark.document import Row
from vhead.benchmark.timing import Work, clocked, load_average, turns
from vhead.benchmark.trl_head import trl_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CRITIC_UPDATES = 4
TILE = 8192
# Those whose first run makes kernels for its sizes.
WARM = {"vhead", "vhead, in place", "bare products"}
QUICK = {"prompts": 1, "rounds": 1}


@dataclass(frozen=True)
class Given:
    """What a step is made of besides the rollouts: an array of every completion's tokens for each name."""

    old_logprobs: list[Tensor]
    advantages: list[Tensor]
    returns: list[Tensor]

    @classmethod
    def drawn(cls, rollouts: list[Rollout]) -> "Given":
        """Random numbers."""
        generator = torch.Generator().manual_seed(2)

        def draw(mean: float) -> list[Tensor]:
            return [torch.randn(len(each.completion), generator=generator) * 0.1 + mean for each in rollouts]

        # Around the logarithm of one in the vocabulary, which is what a model of random weights says.
        return cls(draw(-11.9), draw(0.0), draw(0.0))


@dataclass(frozen=True)
class Contestant:
    """One way to make the gradients: `make` gives what does so, for a model and its rollouts."""

    name: str
    make: Callable[[PreTrainedModel, list[Rollout]], Work]
    has_memory: bool = True


def contestants() -> Iterator[Contestant]:
    """Everything that is measured."""
    yield Contestant("vhead", training_pass)
    yield Contestant("vhead, in place", partial(training_pass, accumulate_in_place=True))
    yield Contestant("padded loop, 4", partial(padded_loop, rows=4))
    yield Contestant("padded loop, 8", partial(padded_loop, rows=8))
    yield Contestant("sorted loop, 4", partial(padded_loop, rows=4, by_length=True))
    yield Contestant("bare products", bare_products, has_memory=False)


def training_pass(body: PreTrainedModel, rollouts: list[Rollout], *, accumulate_in_place: bool = False) -> Work:
    """`vhead.TrainingPass`, with the packing in its time."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body).eval()
    packed, given = TrainingPass(model, accumulate_in_place=accumulate_in_place), Given.drawn(rollouts)

    def update() -> None:
        for batch in packed.batches(rollouts):
            out, totals = packed(batch), batch.totals
            old, advantages = batch.flat(given.old_logprobs), batch.flat(given.advantages)
            loss = losses.policy(out.logprobs, old, advantages, totals=totals)
            (loss + losses.value(out.values, batch.flat(given.returns), totals=totals)).backward()

    return update


def padded_loop(body: PreTrainedModel, rollouts: list[Rollout], *, rows: int, by_length: bool = False) -> Work:
    """TRL's class on right-padded rows, in input order or sorted by length, so that next to none is padding.

    As its trainers do it, logits of every token are made and their log-probabilities taken. The entropies, which TRL
    logs, are left out, although the other side has them.
    """
    model = trl_model().from_pretrained(body).eval()
    order = list(range(len(rollouts)))
    if by_length:
        order.sort(key=lambda place: len(rollouts[place].prompt) + len(rollouts[place].completion))
    count = sum(len(each.completion) for each in rollouts)
    chunks = [order[start : start + rows] for start in range(0, len(order), rows)]
    batches = [_padded([rollouts[place] for place in chunk]) for chunk in chunks]
    given = Given.drawn(rollouts)
    columns = [
        [_beside([per_rollout[place] for place in chunk], batch) for per_rollout in vars(given).values()]
        for chunk, batch in zip(chunks, batches, strict=True)
    ]

    def update() -> None:
        for (tokens, attended, mask, _), (old, advantages, returns) in zip(batches, columns, strict=True):
            logits, _loss, values = model(input_ids=tokens, attention_mask=attended)
            logprobs = functional.log_softmax(logits[:, :-1], dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
            loss = losses.policy(logprobs, old, advantages, mask=mask)
            loss = loss + losses.value(values[:, :-1].float(), returns, mask=mask)
            (loss * (int(mask.sum()) / count)).backward()

    return update


Padded = tuple[Tensor, Tensor, Tensor, list[int]]


def _padded(rollouts: list[Rollout]) -> Padded:
    """Tokens, attention mask, which of the predicted tokens are completions', and where these begin."""
    rows = [torch.cat([torch.tensor(each.prompt), torch.tensor(each.completion)]) for each in rollouts]
    tokens = pad_sequence(rows, batch_first=True)
    attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    starts = [len(each.prompt) - 1 for each in rollouts]
    mask = torch.zeros(len(rows), tokens.shape[1] - 1, dtype=torch.bool)
    for own, start, each in zip(mask, starts, rollouts, strict=True):
        own[start : start + len(each.completion)] = True
    return tokens, attended, mask, starts


def _beside(arrays: list[Tensor], batch: Padded) -> Tensor:
    """Arrays of completions where their tokens are predicted."""
    *_, mask, starts = batch
    found = torch.zeros(mask.shape)
    for own, start, array in zip(found, starts, arrays, strict=True):
        own[start : start + len(array)] = array
    return found


def bare_products(body: PreTrainedModel, rollouts: list[Rollout]) -> Work:
    """Only the matrix products: three of each layer over unique tokens, four of the lm_head over completion tokens."""
    count = sizes(rollouts)
    weights = [m.weight.detach() for m in body.get_submodule("model").modules() if isinstance(m, torch.nn.Linear)]
    dtype = weights[0].dtype
    widths = {size for weight in weights for size in weight.shape}
    rows = {width: torch.randn(count["unique_tokens"], width).to(dtype) for width in widths}
    output = body.get_output_embeddings().weight.detach()
    scored = torch.randn(count["completion_tokens"], output.shape[1]).to(dtype)

    @torch.no_grad()
    def multiply() -> None:
        for weight in weights:
            x, gradient = rows[weight.shape[1]], rows[weight.shape[0]]
            functional.linear(x, weight)
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), x)
        for tile in output.split(TILE):
            functional.linear(scored, tile)
            products = functional.linear(scored, tile)
            torch.mm(products, tile)
            torch.mm(products.t(), scored)

    return multiply


# --- A frozen body ---------------------------------------------------------------------------------------------------


def critic_updates(body: PreTrainedModel, rollouts: list[Rollout], *, keeps: bool) -> Work:
    """So many updates of the value head on the same batches, the body frozen; its states are kept or made anew."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body).eval()
    freeze(model, "body")
    options = {} if keeps else {"keep_states": 0}
    packed, given = TrainingPass(model, returns=["values"], **options), Given.drawn(rollouts)

    def update() -> None:
        batches = packed.batches(rollouts)
        for _ in range(CRITIC_UPDATES):
            for batch in batches:
                losses.value(packed(batch).values, batch.flat(given.returns), totals=batch.totals).backward()

    return update


CRITICS = {"states kept": partial(critic_updates, keeps=True), "full passes": partial(critic_updates, keeps=False)}


# --- The measurements ------------------------------------------------------------------------------------------------


def _measured(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds and peak memory of every contestant, which take turns, and of a critic's updates."""
    torch.set_num_threads(options.threads)
    rollouts = log_normal(options.prompts, options.completions)
    for dtype in options.dtypes:
        # Each has a model of its own, as a frozen body stays frozen.
        works = {name: make(qwen2(options.layers).to(DTYPES[dtype]), rollouts) for name, make in CRITICS.items()}
        body = qwen2(options.layers).to(DTYPES[dtype])
        for parameter in body.parameters():
            parameter.grad = torch.empty_like(parameter).fill_(0.0)
        works |= {each.name: each.make(body, rollouts) for each in contestants() if _is_asked(each, options)}
        for name in WARM & works.keys():
            works[name]()
        for number, name in turns(works, options.rounds):
            yield {"round": number, "contestant": name, "dtype": dtype, **_measure(body, works[name])}


def _measure(body: PreTrainedModel, work: Work) -> Row:
    """Seconds of one run, the norm of its gradients, and bytes above what is there before, gradients among them."""
    body.zero_grad(set_to_none=False)
    ctypes.CDLL(None).malloc_trim(0)  # What the allocator has kept of earlier contestants would not be counted.
    before, row = load_average(), Row()
    row["extra_bytes"] = extra_bytes(lambda: row.update(clocked(work)))
    squares = [float(p.grad.float().square().sum()) for p in body.parameters() if p.grad is not None]
    return row | {"gradient_norm": sum(squares) ** 0.5, "load_before": before, "load_after": load_average()}


def _is_asked(contestant: Contestant, options: argparse.Namespace) -> bool:
    return options.only in contestant.name and not (options.quick and contestant.name == "padded loop, 8")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "update", rounds=3, layers=12, prompts=4, completions=8)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help=f"{QUICK}, and no loop of 8 rows")
    parser.add_argument("--only", default="", help="contestants of such names")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    workload = sizes(log_normal(options.prompts, options.completions))
    figures = Figures(options, layers=options.layers, critic_updates=CRITIC_UPDATES, workload=workload)
    times: list[Row] = []
    for row in _measured(options):
        print("{dtype}, {contestant}: {wall_s:.2f} s, {processor_s:.2f} s of processors".format(**row), flush=True)
        times.append(row)
        figures.put("times", times)
    with_memory = {each.name for each in contestants() if each.has_memory}
    figures.put("memory", [row for row in times if row["contestant"] in with_memory])
    figures.close(report.update)


if __name__ == "__main__":
    _main()
