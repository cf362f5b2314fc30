"""What operators and probes ask: whether the server lives, what it serves, how it fares."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from vhead.errors import ServerStoppingError
from vhead.serve.entrance import response_to
from vhead.serve.service import Service


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["operations"])

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
        """The model under each of its names."""
        limit = service.scorer.encoder.limit.tokens
        about = {"object": "model", "created": 0, "owned_by": "vhead", "max_model_len": limit, "step": service.step}
        return {"object": "list", "data": [{"id": name, **about} for name in service.names]}

    return routes
