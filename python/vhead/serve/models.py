"""Models that are served: what they are called, how rollouts become what they score, and their batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vhead import formats
from vhead.errors import RecordError, RequestError
from vhead.heads import ValueHead
from vhead.rollouts import Rollout
from vhead.rollouts.encoding import Encoded
from vhead.rollouts.messages import texts_in
from vhead.rollouts.wording import named
from vhead.scoring.fields import WEIGHTS_STEP, Asked
from vhead.scoring.scorer import Scorer
from vhead.scoring.scores import Scores
from vhead.serve.batching import ScoredBatch
from vhead.serve.limits import RequestLimits
from vhead.serve.weights import OWN_WEIGHTS, Weights

# Far more than texts have on average.
_CHARACTERS_PER_TOKEN = 8
# They are float32, those of likeliest tokens with an int64 each.
_MOST_SELECTED = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Rollouts of a request as token ids, and what is asked for of them.

    Attributes:
        model: Which model scores them.
        rollouts: Of token ids, not longer than the model takes.
        asked: What is asked for.
        encoded: The same before: with the characters that their tokens stand for.
    """

    model: "ServedModel"
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

    def step(self, scores: Scores) -> int | None:
        """The step of the weights that scored them; the earliest, where new ones came in between."""
        if WEIGHTS_STEP not in scores.computed or not len(scores):
            return self.model.weights.step
        step = int(scores.weights_step.min())
        return self.model.weights.own_step if step == OWN_WEIGHTS else step


class ServedModel:
    """A model, or one of several heads on one, with its names.

    Args:
        scorer: It.
        names: What clients may call it; the first one is what answers call it.
        weights: Its weights, which several heads share.
        limits: What a request may have.

    Attributes:
        scorer: As given.
        names: As given.
        weights: As given.
    """

    def __init__(self, scorer: Scorer, names: Sequence[str], weights: Weights, limits: RequestLimits) -> None:
        self.scorer, self.names, self.weights, self._limits = scorer, tuple(names), weights, limits

    @property
    def name(self) -> str:
        """What answers call it."""
        return self.names[0]

    def prepare(self, rollouts: Sequence[Rollout], asked: Asked, names: Sequence[str] | None = None) -> Prepared:
        """Turns rollouts into token ids and checks them; to be run by `Service.read`.

        Raises:
            RequestError: There are none, or more rollouts, tokens, text or selected tokens than a request may have.
            RecordError: One of them cannot be scored.
        """
        if not rollouts:
            raise RequestError("rollouts: expected at least one, got none")
        self.check_count(len(rollouts))
        self.check_texts([(rollout.prompt, rollout.completion, rollout.tools) for rollout in rollouts])
        if any(rollout.candidates is not None for rollout in rollouts):
            asked = replace(asked, returns=(*asked.returns, "candidates"))
        fits = self.scorer.fitting(asked)
        encoded: list[Encoded] = []
        tokens = selected = 0
        for place, rollout in enumerate(rollouts):
            name = names[place] if names is not None else f"rollouts[{place}]"
            one = self.scorer.encoder.encode(place, rollout, name, with_spans="token_ids" in asked)
            fits.check(one)
            tokens += len(one)
            if tokens > self._limits.tokens:
                limit = self._limits.tokens
                raise RequestError(f"expected at most {limit} tokens in a request, got more in {name}", 413)
            candidates = 0 if one.candidates is None else one.candidates.shape[1]
            selected += one.completion_length * (candidates + asked.top)
            if selected > _MOST_SELECTED:
                expected = (
                    f"at most {_MOST_SELECTED:,} log-probabilities of candidates and likeliest tokens in a request"
                )
                raise RequestError(f"expected {expected}, got more up to {name}", 413)
            encoded.append(one)
        return Prepared(self, tuple(map(_of_ids, encoded)), asked, tuple(encoded))

    def check_texts(self, value: object) -> None:
        """Raises `RequestError` for more text than the tokens of a request can be: reading it holds up the others."""
        most = _CHARACTERS_PER_TOKEN * self._limits.tokens
        if sum(map(len, texts_in(value))) > most:
            raise RequestError(f"expected at most {most:,} characters of text in a request, got more", 413)

    def check_count(self, count: int, what: str = "rollouts") -> None:
        """Raises `RequestError` for more rollouts than a request may have, or whatever these are called in it."""
        if count > self._limits.rollouts:
            raise RequestError(f"expected at most {self._limits.rollouts} {what} in a request, got {count}", 413)


@dataclass(frozen=True, slots=True, eq=False)
class _Queued:
    """A rollout of a batch, and its place there."""

    place: int
    rollout: Rollout

    @property
    def where(self) -> str:
        return f"rollout {self.place} of a batch"

    def rollouts(self) -> tuple[Rollout]:
        return (self.rollout,)


class ScorerBatches:
    """Scores batches of rollouts, each with one model and weights of one step.

    Args:
        models: The models by name; they are used in one thread at a time.
    """

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models

    def __call__(self, model: str, rollouts: Sequence[Rollout], asked: Asked) -> ScoredBatch:
        """Scores the rollouts that can be scored; errors name the others by their ids alone."""
        served = self._models[model]
        served.weights.refresh()
        queued = [_Queued(place, rollout) for place, rollout in enumerate(rollouts)]
        places = {named(entry.where, entry.rollout.id): entry.place for entry in queued}
        errors: dict[int, RecordError] = {}
        counts = [0, 0]

        def note(error: RecordError) -> None:
            errors[places[str(error.record)]] = error

        def add(_rollouts: int, tokens: int, computed: int) -> None:
            counts[0] += tokens
            counts[1] += computed

        parts = [chunk.scores for chunk in served.scorer.scored(queued, asked, on_error=note, on_batch=add)]
        scores = Scores.concat(parts or [served.scorer.nothing(asked)])
        if served.weights.follows:
            steps = np.full(len(scores), served.weights.stamp)
            scores = replace(scores, computed={**scores.computed, WEIGHTS_STEP: steps})
        return ScoredBatch(scores, errors, *counts)


def scorer_with_head(scorer: Scorer, path: str | Path) -> Scorer:
    """A scorer of the same language model with the head of a file.

    Raises:
        HeadNotFoundError: The file holds none.
        HeadError: It fits another language model, or the file is broken.
    """
    model: Any = scorer.model
    head = ValueHead.like(formats.load(path), model.config, hidden_size=model.v_head.hidden_size)
    return scorer.with_head(head.to(scorer.device).eval())


def _of_ids(one: Encoded) -> Rollout:
    prompt, completion = one.tokens[: one.prompt_length], one.tokens[one.prompt_length :]
    return Rollout(prompt, completion, one.id, mask=one.mask, candidates=one.candidates)
