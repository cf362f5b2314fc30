"""The protocols of other reward servers: OpenRLHF's and LLaMA-Factory's."""

import time
from collections.abc import Callable
from typing import Annotated, Any

import orjson
from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from vhead.errors import RequestError
from vhead.scoring.scores import Scores
from vhead.serve.answering import Answering
from vhead.serve.bodies import JSON, check_json, decoded, schema
from vhead.serve.models import Prepared, ServedModel
from vhead.serve.protocols.sequences import Input, all_token_ids, check_count, parts_of, prepared
from vhead.serve.service import Service


class GetRewardBody(Struct):
    """What OpenRLHF sends: prompts and responses as texts; its prompts and labels are passed over."""

    query: Input
    model: str | None = None


class EvaluationBody(Struct):
    """What LLaMA-Factory sends; its client calls every model `model`."""

    messages: Input
    model: str | None = None
    max_length: Annotated[int, Meta(ge=2)] | None = None


class RewardRoutes:
    """These protocols on a model."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._service: Service = answering.service

    async def get_reward(self, request: Request) -> Response:
        """OpenRLHF's."""

        def prepare(body: bytes) -> Prepared:
            asked = decoded(body, GetRewardBody)
            return _prepared(self._service.model(asked.model), asked.query, "query")

        def reply(about: dict[str, Any], rewards: list[float]) -> dict[str, Any]:
            return {"rewards": rewards, "scores": rewards, "extra_logs": {}, "step": about["step"]}

        return await self._answer(request, prepare, reply)

    async def evaluation(self, request: Request) -> Response:
        """LLaMA-Factory's."""

        def prepare(body: bytes) -> Prepared:
            asked = decoded(body, EvaluationBody)
            model = self._service.model(asked.model if asked.model in self._service.models else None)
            return _prepared(model, asked.messages, "messages", asked.max_length)

        def reply(about: dict[str, Any], rewards: list[float]) -> dict[str, Any]:
            return {"id": f"scoreval-{time.time_ns():x}", "object": "score.evaluation", **about, "scores": rewards}

        return await self._answer(request, prepare, reply)

    async def _answer(
        self,
        request: Request,
        prepare: Callable[[bytes], Prepared],
        reply: Callable[[dict[str, Any], list[float]], dict[str, Any]],
    ) -> Response:
        check_json(request)

        def write(given: Prepared, scores: Scores) -> Response:
            about = {"model": given.model.name, "step": given.step(scores)}
            return Response(orjson.dumps(reply(about, scores.reward.tolist())), media_type=JSON)

        return await self._answering.reply(request, prepare, write)


def _prepared(model: ServedModel, given: Input, field: str, most: int | None = None) -> Prepared:
    count = model.scorer.num_outputs
    if count != 1:
        raise RequestError(f"this protocol has one reward a text, and the head gives {count} numbers; use /score")
    parts = parts_of(given, field)
    check_count(model, parts, field)
    names = [f"{field}[{place}]" for place in range(len(parts))]
    sequences = [ids[:most] for ids in all_token_ids(model, parts, names)]
    return prepared(model, sequences, names)


def router(answering: Answering) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["reward servers"])
    own = RewardRoutes(answering)

    @routes.post("/get_reward", summary="Rewards of texts", openapi_extra=schema(GetRewardBody))
    async def get_reward(request: Request) -> Response:
        """The protocol of OpenRLHF's `--remote_rm_url`."""
        return await own.get_reward(request)

    @routes.post("/v1/score/evaluation", summary="Rewards of texts", openapi_extra=schema(EvaluationBody))
    async def evaluation(request: Request) -> Response:
        """The protocol of LLaMA-Factory's reward server (`reward_model_type: api`)."""
        return await own.evaluation(request)

    return routes
