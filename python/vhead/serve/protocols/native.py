"""`POST /score`: rollouts in, whatever the scorer gives of them out."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter
from msgspec import Meta, Struct, structs
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from vhead.errors import FieldError, RecordError, RequestError
from vhead.rollouts import Rollout
from vhead.rollouts.records import rollouts_of
from vhead.scoring.scores import Scores
from vhead.serve.answering import Answering
from vhead.serve.bodies import JSON, decoded, media_type, schema
from vhead.serve.models import Prepared
from vhead.serve.protocols import arrow, npy
from vhead.serve.service import Service

# As wide as answers in JSON can be.
Id = str | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | float | None
TokenIds = list[Annotated[int, Meta(ge=0)]] | str
_ARRAYS = ("prompt_ids", "completion_ids", "completion_mask", "candidates")


class RolloutBody(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A rollout in one of the forms that files have; arrays also as base64 of a .npy file."""

    id: Id = None
    prompt: str | list[dict[str, Any]] | None = None
    completion: str | list[dict[str, Any]] | None = None
    prompt_ids: TokenIds | None = None
    completion_ids: TokenIds | None = None
    completion_mask: list[bool | int] | str | None = None
    candidates: list[list[Annotated[int, Meta(ge=0)]]] | str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class ScoreBody(Struct, forbid_unknown_fields=True):
    """Rollouts, and what is wanted of them; the fields are those of `Scorer.score`."""

    rollouts: list[RolloutBody]
    returns: list[str] | None = None
    temperature: float = 1.0
    top_logprobs: Annotated[int, Meta(ge=0)] = 0
    model: str | None = None


class ScoreRoute:
    """The native protocol on a model."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._service: Service = answering.service
        self._readers: dict[str, Callable[[bytes, QueryParams], Prepared]] = {JSON: self._of_json}
        self._writers: dict[str, Callable[[Prepared, Scores], Response]] = {
            JSON: self._as_json,
            npy.MEDIA_TYPE: self._as_npy,
        }
        if arrow.is_there():
            self._readers[arrow.MEDIA_TYPE] = self._of_arrow
            self._writers[arrow.MEDIA_TYPE] = self._as_arrow

    async def __call__(self, request: Request) -> Response:
        """One request, in the form that its Content-Type says, answered in the form that Accept asks for."""
        query = request.query_params
        read, write = self._choice(request, "content-type", self._readers), self._writer(request)
        return await self._answering.reply(request, lambda body: read(body, query), write)

    def _choice(self, request: Request, header: str, among: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
        kind = media_type(request.headers.get(header))
        if kind not in among:
            raise RequestError(f"Content-Type: expected one of {', '.join(among)}, got {kind[:60]!r}", 415)
        return among[kind]

    def _writer(self, request: Request) -> Callable[[Prepared, Scores], Response]:
        accepted = [media_type(part) for part in request.headers.get("accept", JSON).split(",")]
        for kind in accepted:
            if kind in self._writers:
                return self._writers[kind]
        if not {"*/*", "application/*"} & set(accepted):
            raise RequestError(f"Accept: expected one of {', '.join(self._writers)}", 406)
        return self._as_json

    def _of_json(self, body: bytes, query: QueryParams) -> Prepared:
        if query:
            raise RequestError("the address: expected no query, because a body of JSON says what is asked for")
        asked = decoded(body, ScoreBody)
        model = self._service.model(asked.model)
        model.check_count(len(asked.rollouts))
        wanted = model.scorer.asked(asked.returns, asked.temperature, asked.top_logprobs)
        rollouts = [_rollout(_record(one, place), place) for place, one in enumerate(asked.rollouts)]
        return model.prepare(rollouts, wanted)

    def _of_arrow(self, body: bytes, query: QueryParams) -> Prepared:
        model = self._service.model(query.get("model"))
        wanted = model.scorer.asked(**_asked_in(query))
        records = arrow.records(body, self._service.limits.rollouts)
        return model.prepare([_rollout(record, place) for place, record in enumerate(records)], wanted)

    def _head(self, prepared: Prepared, scores: Scores) -> dict[str, Any]:
        return {"model": prepared.model.name, "step": prepared.step(scores)}

    def _as_json(self, prepared: Prepared, scores: Scores) -> Response:
        scores = prepared.completed(scores)
        names = scores.columns
        rows = []
        for place, score in enumerate(scores):
            row: dict[str, Any] = {"id": score.id, "prompt_length": score.prompt_length, "mask": score.mask}
            for name in names:
                flat, offsets = scores.flat(name)
                row[name] = flat[place] if offsets is None else flat[offsets[place] : offsets[place + 1]]
            rows.append(row)
        content = orjson.dumps(
            {**self._head(prepared, scores), "scores": rows}, default=_contiguous, option=orjson.OPT_SERIALIZE_NUMPY
        )
        return Response(content, media_type=JSON)

    def _as_npy(self, prepared: Prepared, scores: Scores) -> Response:
        scores = prepared.completed(scores)
        arrays = {name: scores.flat(name)[0] for name in scores.columns}
        arrays |= {"prompt_lengths": scores.prompt_lengths, "offsets": scores.offsets, "mask": scores.mask}
        if scores.step_offsets is not None:
            arrays["step_offsets"] = scores.step_offsets
        encoded = {name: npy.encoded(array) for name, array in arrays.items()}
        return Response(
            orjson.dumps({**self._head(prepared, scores), "ids": scores.ids, "arrays": encoded}),
            media_type=npy.MEDIA_TYPE,
        )

    def _as_arrow(self, prepared: Prepared, scores: Scores) -> Response:
        content = arrow.stream(prepared.completed(scores), self._head(prepared, scores))
        return Response(content, media_type=arrow.MEDIA_TYPE)


def _contiguous(value: Any) -> Any:
    """What orjson cannot take as it is: views with gaps, which one output of several heads is, and numpy's numbers."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _asked_in(query: QueryParams) -> dict[str, Any]:
    """The arguments of `Scorer.asked` in an address: `?returns=values,reward&temperature=0.7`."""
    kinds: dict[str, Callable[[str], Any]] = {
        "returns": lambda text: [name.strip() for name in text.split(",")],
        "temperature": float,
        "top_logprobs": int,
    }
    asked = {}
    for name, text in query.multi_items():
        if name == "model":
            continue
        if name not in kinds or name in asked:
            raise RequestError(
                f"the address: expected each of model, {', '.join(kinds)} at most once, got {name[:40]!r}"
            )
        try:
            asked[name] = kinds[name](text)
        except ValueError:
            raise RequestError(f"{name}: expected a number, got {text[:40]!r}") from None
    return asked


def _record(one: RolloutBody, place: int) -> dict[str, Any]:
    record = {name: value for name, value in structs.asdict(one).items() if value is not None}
    for name in _ARRAYS:
        if isinstance(text := record.get(name), str):
            try:
                record[name] = npy.decoded(text)
            except ValueError as error:
                raise FieldError(
                    f"rollouts[{place}]", name, expected="base64 of a .npy file of numbers", got=str(error)
                ) from None
    return record


def _rollout(record: Mapping[str, Any], place: int) -> Rollout:
    found = rollouts_of(record, f"rollouts[{place}]")
    if len(found) != 1:
        raise RecordError(f"rollouts[{place}]: expected one rollout, got a pair; send both sides as rollouts")
    return found[0]


def router(answering: Answering) -> APIRouter:
    """The routes of the native protocol."""
    routes = APIRouter(tags=["scores"])
    body = schema(ScoreBody)
    content = body["requestBody"]["content"]
    content[arrow.MEDIA_TYPE] = {"schema": {"type": "string", "format": "binary"}}
    score = ScoreRoute(answering)

    @routes.post("/score", summary="Scores of rollouts", openapi_extra=body)
    async def score_rollouts(request: Request) -> Response:
        """Values, log-probabilities, entropies and rewards of rollouts, as `Scorer.score` gives them."""
        return await score(request)

    return routes
