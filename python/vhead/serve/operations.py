"""What operators and probes ask: whether the server lives, what it serves and with which weights, how it fares."""

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Annotated

import orjson
from fastapi import APIRouter
from msgspec import Meta, Struct
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from vhead.errors import RequestError, ServerStoppingError
from vhead.serve.answering import Answering
from vhead.serve.bodies import JSON, decoded, schema
from vhead.serve.entrance import response_to
from vhead.serve.models import ServedModel
from vhead.serve.service import Service


class ReloadBody(Struct, forbid_unknown_fields=True):
    """Which model; None: the first one."""

    model: str | None = None


class RollbackBody(Struct, forbid_unknown_fields=True):
    """Which model, and to which step; None: the one before."""

    model: str | None = None
    step: Annotated[int, Meta(ge=0)] | None = None


class WeightsRoutes:
    """The weights of the models, and what operators do with them.

    Args:
        answering: Receives bodies.
        is_keyed: Whether all requests have brought the server's key. Otherwise weights are changed from this machine
            alone, and by no page in a browser.
    """

    def __init__(self, answering: Answering, *, is_keyed: bool) -> None:
        self._answering, self._service, self._is_keyed = answering, answering.service, is_keyed

    def about(self, name: str | None) -> Response:
        """What `/weights` answers."""
        return _about(self._service.model(name))

    async def reload(self, request: Request) -> Response:
        """What `/reload` answers."""

        def change(body: bytes) -> tuple[ServedModel, Callable[[], None]]:
            model = self._service.model(decoded(body or b"{}", ReloadBody).model)
            return model, model.weights.reload

        return await self._changed(request, change)

    async def roll_back(self, request: Request) -> Response:
        """What `/weights/rollback` answers."""

        def change(body: bytes) -> tuple[ServedModel, Callable[[], None]]:
            asked = decoded(body or b"{}", RollbackBody)
            model = self._service.model(asked.model)
            return model, lambda: model.weights.roll_back(asked.step)

        return await self._changed(request, change)

    async def _changed(
        self, request: Request, change: Callable[[bytes], tuple[ServedModel, Callable[[], None]]]
    ) -> Response:
        if not self._is_keyed:
            _check_is_operator(request)
        body = await self._answering.received(request)
        model, work = change(body)
        await asyncio.wrap_future(self._service.batcher.call(work))
        return _about(model)


def _check_is_operator(request: Request) -> None:
    host = request.client.host if request.client else ""
    if not _is_loopback(host) or "origin" in request.headers:
        raise RequestError("weights are changed from this machine, and not by a page; or with a server's key", 403)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _about(model: ServedModel) -> Response:
    return Response(orjson.dumps({"model": model.name, **model.weights.about()}), media_type=JSON)


def router(answering: Answering, *, is_keyed: bool) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["operations"])
    service = answering.service
    _add_probes(routes, service)
    weights = WeightsRoutes(answering, is_keyed=is_keyed)

    @routes.get("/weights", summary="Which weights are served")
    def about(model: str | None = None) -> Response:
        """Their step and digest, the published steps, and what is wrong with a publication that was refused."""
        return weights.about(model)

    @routes.post("/reload", summary="Serve the newest published weights", openapi_extra=schema(ReloadBody))
    async def reload(request: Request) -> Response:
        """Brings the newest weights in at once, and follows again after a way back. Answers as `/weights` does."""
        return await weights.reload(request)

    @routes.post("/weights/rollback", summary="Serve earlier published weights", openapi_extra=schema(RollbackBody))
    async def roll_back(request: Request) -> Response:
        """Brings earlier weights in, which stay until `/reload`. Answers as `/weights` does."""
        return await weights.roll_back(request)

    return routes


def _add_probes(routes: APIRouter, service: Service) -> None:
    @routes.get("/health", summary="Whether the server lives")
    async def health() -> dict[str, str]:
        """Answers with 200 as long as the server answers at all."""
        return {"status": "alive"}

    @routes.get("/ready", summary="Whether the server takes requests", response_model=dict[str, str])
    async def ready(request: Request) -> object:
        """Answers with 200 while requests are taken, and with 503 when the server stops."""
        try:
            service.batcher.check_open()
        except ServerStoppingError as error:
            return response_to(error, request.state.request_id)
        return {"status": "ready"}

    @routes.get("/metrics", summary="Counters for Prometheus")
    async def metrics() -> Response:
        """Queue, batches, tokens, latencies and the step of the weights, in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/models", summary="What is served")
    async def models() -> dict[str, object]:
        """Each model under each of its names."""
        return {"object": "list", "data": [_listed(name, model) for name, model in service.models.items()]}


def _listed(name: str, model: ServedModel) -> dict[str, object]:
    about = {"object": "model", "created": 0, "owned_by": "vhead", "max_model_len": model.scorer.encoder.limit.tokens}
    return {"id": name, **about, "step": model.weights.step}
