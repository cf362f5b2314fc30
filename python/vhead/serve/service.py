"""What a server does for a request, whatever the protocol: rollouts into token ids, into the queue, into scores."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from vhead.errors import FieldError, RequestError
from vhead.rollouts import Rollout
from vhead.rollouts.encoding import Encoded
from vhead.scoring.fields import Asked
from vhead.scoring.scorer import Scorer
from vhead.scoring.scores import Scores
from vhead.serve.batching import Batcher, QueueLimits
from vhead.serve.limits import RequestLimits
from vhead.serve.metrics import Metrics
from vhead.serve.scorer_batches import ScorerBatches

Result = TypeVar("Result")

# So many fill the rows of the model's batches evenly, and more would make others wait longer.
_BUDGETS_PER_BATCH = 4


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Rollouts of a request as token ids, and what is asked for of them.

    Attributes:
        rollouts: Of token ids, not longer than the model takes.
        asked: What is asked for.
        encoded: The same before: with the characters that their tokens stand for.
    """

    rollouts: tuple[Rollout, ...]
    asked: Asked
    encoded: tuple[Encoded, ...]

    @property
    def tokens(self) -> int:
        """Of all rollouts, prompts included."""
        return sum(map(len, self.encoded))

    def completed(self, scores: Scores) -> Scores:
        """The scores with what token ids do not tell: who was truncated, and which characters tokens stand for."""
        truncated = None if scores.truncated is None else np.array([one.truncated for one in self.encoded], np.bool_)
        computed = dict(scores.computed)
        if "token_offsets" in computed:
            counts = scores.token_counts.tolist()
            spans = [one.spans[-n:] for one, n in zip(self.encoded, counts, strict=True) if one.spans is not None and n]
            computed["token_offsets"] = np.concatenate([np.empty((0, 2), np.int64), *spans])
        return replace(scores, truncated=truncated, computed=computed)


class Service:
    """A model that is served: its names, its queue, and the thread that tokenises.

    Args:
        scorer: The model.
        names: What clients may call it; the first one is what answers call it.
        queue: How much may wait; None: batches of four times the scorer's token budget, otherwise the defaults.
        limits: What a request may have.
        step: The training step of the weights, where that is known.

    Attributes:
        scorer: As given.
        names: As given.
        limits: As given.
        step: As given.
        metrics: What was counted.
        batcher: The queue.
    """

    def __init__(
        self,
        scorer: Scorer,
        names: Sequence[str],
        *,
        queue: QueueLimits | None = None,
        limits: RequestLimits | None = None,
        step: int | None = None,
    ) -> None:
        self.scorer, self.names, self.step = scorer, tuple(names), step
        self.limits = limits or RequestLimits()
        self.metrics = Metrics()
        queue = queue or QueueLimits(batch_tokens=batch_tokens(scorer))
        self.batcher = Batcher(ScorerBatches(scorer), queue, on_batch=self.metrics.batch)
        self.metrics.watch(lambda: self.batcher.queued_requests, lambda: self.batcher.queued_tokens, step)
        # Tokenizers of transformers are not made for several threads at once.
        self._reader = ThreadPoolExecutor(1, "vhead-reader")

    async def read(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Runs what takes time and is not the model's in a thread of its own, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work, *arguments)

    def check_name(self, name: str | None) -> None:
        """Checks what a client calls the model; None is what it is called.

        Raises:
            RequestError: It has another name.
        """
        if name is not None and name not in self.names:
            raise RequestError(f"model: expected one of {', '.join(self.names)}, got {name[:100]!r}", 404)

    def prepare(self, rollouts: Sequence[Rollout], asked: Asked, names: Sequence[str] | None = None) -> Prepared:
        """Turns rollouts into token ids and checks them; to be run by `read`.

        Raises:
            RequestError: There are none, or more rollouts or tokens than a request may have.
            RecordError: One of them cannot be scored.
        """
        if not rollouts:
            raise RequestError("rollouts: expected at least one, got none")
        self.check_count(len(rollouts))
        if rollouts[0].candidates is not None:
            asked = replace(asked, returns=(*asked.returns, "candidates"))
        encoded: list[Encoded] = []
        tokens = 0
        for place, rollout in enumerate(rollouts):
            name = names[place] if names is not None else f"rollouts[{place}]"
            one = self.scorer.encoder.encode(place, rollout, name, with_spans="token_ids" in asked)
            _check_alike(encoded[0] if encoded else one, one)
            tokens += len(one)
            if tokens > self.limits.tokens:
                limit = self.limits.tokens
                raise RequestError(f"expected at most {limit} tokens in a request, got more in {name}", 413)
            encoded.append(one)
        return Prepared(tuple(map(_of_ids, encoded)), asked, tuple(encoded))

    def check_count(self, count: int) -> None:
        """Raises `RequestError` for more rollouts than a request may have."""
        if count > self.limits.rollouts:
            raise RequestError(f"expected at most {self.limits.rollouts} rollouts in a request, got {count}", 413)

    def submit(self, prepared: Prepared, client: str) -> Future[Scores]:
        """Queues what was prepared.

        Raises:
            ServerBusyError: There is no room in the queue.
            ServerStoppingError: The server is stopping.
        """
        return self.batcher.submit(prepared.rollouts, prepared.asked, client=client)

    def close(self, timeout_s: float | None = None) -> bool:
        """Scores what waits and ends the threads; whether all that was accepted has been scored."""
        done = self.batcher.stop(timeout_s)
        self._reader.shutdown()
        return done


def batch_tokens(scorer: Scorer) -> int:
    """How many tokens a batch takes through a scorer's model, where nobody says."""
    return scorer.token_budget * _BUDGETS_PER_BATCH


def _check_alike(first: Encoded, one: Encoded) -> None:
    counts = [0 if each.candidates is None else each.candidates.shape[1] for each in (first, one)]
    if counts[0] != counts[1]:
        expected = f"{counts[0]} for each token, as {first.name} has"
        raise FieldError(one.name, "candidates", expected=expected, got=str(counts[1]))


def _of_ids(one: Encoded) -> Rollout:
    prompt, completion = one.tokens[: one.prompt_length], one.tokens[one.prompt_length :]
    return Rollout(prompt, completion, one.id, mask=one.mask, candidates=one.candidates)
