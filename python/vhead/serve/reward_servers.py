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
from vhead.serve.sequences import Input, parts_of, prepared, token_ids
from vhead.serve.service import Prepared, Service


class GetRewardBody(Struct):
    """What OpenRLHF sends: prompts and responses as texts; its prompts and labels are passed over."""

    query: Input


class EvaluationBody(Struct):
    """What LLaMA-Factory sends; its client calls every model `model`."""

    messages: Input
    max_length: Annotated[int, Meta(ge=2)] | None = None


class RewardRoutes:
    """These protocols on a model."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._service: Service = answering.service

    async def get_reward(self, request: Request) -> Response:
        """OpenRLHF's."""

        def prepare(body: bytes) -> Prepared:
            return self._prepared(decoded(body, GetRewardBody).query, "query")

        def reply(rewards: list[float]) -> dict[str, Any]:
            return {"rewards": rewards, "scores": rewards, "extra_logs": {}, "step": self._service.step}

        return await self._answer(request, prepare, reply)

    async def evaluation(self, request: Request) -> Response:
        """LLaMA-Factory's."""

        def prepare(body: bytes) -> Prepared:
            asked = decoded(body, EvaluationBody)
            return self._prepared(asked.messages, "messages", asked.max_length)

        def reply(rewards: list[float]) -> dict[str, Any]:
            about = {"id": f"scoreval-{time.time_ns():x}", "object": "score.evaluation"}
            return {**about, "model": self._service.names[0], "scores": rewards, "step": self._service.step}

        return await self._answer(request, prepare, reply)

    async def _answer(
        self,
        request: Request,
        prepare: Callable[[bytes], Prepared],
        reply: Callable[[list[float]], dict[str, Any]],
    ) -> Response:
        check_json(request)
        count = self._service.scorer.num_outputs
        if count != 1:
            raise RequestError(f"this protocol has one reward a text, and the head gives {count} numbers; use /score")

        def write(_prepared: Prepared, scores: Scores) -> Response:
            return Response(orjson.dumps(reply(scores.reward.tolist())), media_type=JSON)

        return await self._answering.reply(request, prepare, write)

    def _prepared(self, given: Input, field: str, most: int | None = None) -> Prepared:
        parts = parts_of(given, field)
        self._service.check_count(len(parts))
        names = [f"{field}[{place}]" for place in range(len(parts))]
        sequences = [token_ids(self._service, part, name)[:most] for part, name in zip(parts, names, strict=True)]
        return prepared(self._service, sequences, names)


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
