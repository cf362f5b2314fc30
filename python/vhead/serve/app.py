"""The application: the routes of every protocol on one model."""

from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from vhead.errors import RequestError, ServerBusyError, ServerStoppingError
from vhead.serve import operations, page
from vhead.serve.answering import Answering
from vhead.serve.entrance import OPEN_PATHS, Entrance, error_response, response_to
from vhead.serve.protocols import native, reward_servers, vllm
from vhead.serve.service import Service

# A new protocol is one more module here, with a function `router`, and the classes of its bodies below.
PROTOCOLS = (native, vllm, reward_servers)
_BODIES = (
    native.ScoreBody,
    vllm.PoolingBody,
    vllm.TokenizeBody,
    reward_servers.GetRewardBody,
    reward_servers.EvaluationBody,
    operations.ReloadBody,
    operations.RollbackBody,
)


def make_app(service: Service, api_key: str | None = None) -> FastAPI:
    """An ASGI application that serves a model.

    Args:
        service: The model.
        api_key: What clients have to send as `Authorization: Bearer`; None: nothing.
    """
    # The pages that show the document load scripts from elsewhere.
    app = FastAPI(title="vhead", version=version("vhead"), docs_url=None, redoc_url=None)
    answering = Answering(service)
    for protocol in PROTOCOLS:
        app.include_router(protocol.router(answering))
    app.include_router(operations.router(answering, is_keyed=api_key is not None))
    app.add_exception_handler(HTTPException, _refused)
    for error in (RequestError, ServerBusyError, ServerStoppingError):
        app.add_exception_handler(error, _of_request)
    app.include_router(page.router())
    app.add_middleware(Entrance, metrics=service.metrics, tracing=service.tracing, api_key=api_key)
    _describe(app, is_keyed=api_key is not None)
    return app


async def _refused(request: Request, error: Any) -> Response:
    """What Starlette itself answers, such as 404 and 405, in the form of all errors."""
    return error_response(error.status_code, str(error.detail), request.state.request_id, error.headers)


async def _of_request(request: Request, error: Any) -> Response:
    return response_to(error, request.state.request_id)


def _describe(app: FastAPI, *, is_keyed: bool) -> None:
    """Adds the classes of bodies, the form of errors and the key to the OpenAPI document, which is made once."""
    document = app.openapi()
    _, components = msgspec.json.schema_components(_BODIES, ref_template="#/components/schemas/{name}")
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= components | {"Error": _ERROR}
    error = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for method in methods.values():
            method["responses"] |= {"4XX": error, "5XX": error}
            method["security"] = [{"key": []}] if is_keyed and path not in OPEN_PATHS else []


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "request_id"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": "integer"},
                "request_id": {"type": "string"},
            },
        }
    },
}
