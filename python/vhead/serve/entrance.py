"""What every request passes: who may enter, its id, its line in the log, and what an error looks like from outside."""

import hmac
import logging
import random
import re
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vhead.errors import RecordError, RequestError, ServerBusyError, ServerStoppingError, VheadError
from vhead.serve.metrics import Metrics
from vhead.serve.tracing import Tracing

logger = logging.getLogger("vhead.serve")

# What a machine that looks whether the server lives asks without a key, and the page, which then asks for one.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_CLIENT = re.compile(r"[ -~]{1,64}")
# Nobody is there to read it; proxies write this number into their logs.
CLIENT_GONE = 499
# As much as h11 waits for; what comes at once it takes whole.
_HEADER_BYTES = 2**16
_KINDS = {400: "BadRequest", 401: "Unauthorized", 404: "NotFound", 408: "Timeout", 413: "TooLarge", 504: "Timeout"}


class Entrance:
    """Lets requests in that bring the key, and answers for those that fail.

    Args:
        app: What is behind it.
        metrics: Told of every answer.
        tracing: Told of every request; None: nobody is.
        api_key: What has to be in `Authorization: Bearer`; None: nothing has to.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None, api_key: str | None = None
    ) -> None:
        self._app = app
        self._tracing = tracing
        self._metrics = metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _ID.fullmatch(given) else _new_id()
        state["client"] = _client(scope, headers)
        with nullcontext() if self._tracing is None else self._tracing.request(scope, headers):
            await self._answered(scope, headers, receive, send)

    async def _answered(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        state = scope["state"]
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = state["request_id"]
            await send(message)

        if _header_bytes(scope) > _HEADER_BYTES:
            message = f"the header: expected at most {_HEADER_BYTES} bytes, got more"
            await error_response(400, message, state["request_id"])(scope, receive, answer)
        elif not self._may_enter(scope["path"], headers):
            await _unauthorized(state["request_id"])(scope, receive, answer)
        else:
            status = await self._passed(scope, receive, answer) or status
        state["status"] = status
        seconds = time.perf_counter() - started
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.answered(route, status, seconds)
        _log(scope, route, status, seconds, state)

    async def _passed(self, scope: Scope, receive: Receive, answer: Send) -> int | None:
        try:
            await self._app(scope, receive, answer)
        except Exception:  # Told of in the log alone, as it may show what is inside.
            request_id = scope["state"]["request_id"]
            logger.exception("request %s failed", request_id)
            message = "the server failed inside; its log says more under this request's id"
            await error_response(500, message, request_id)(scope, receive, answer)
            return 500
        return None

    def _may_enter(self, path: str, headers: Headers) -> bool:
        if self._key is None or path in OPEN_PATHS:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # In constant time, so that nobody finds the key letter by letter.
        return hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key) and scheme.lower() == "bearer"


def _header_bytes(scope: Scope) -> int:
    address = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return address + sum(len(name) + len(value) for name, value in scope["headers"])


def _new_id() -> str:
    # No secret; the system's random numbers would cost a wait for the interpreter's lock.
    return f"{random.getrandbits(128):032x}"


def _client(scope: Scope, headers: Headers) -> str:
    """Whom the queue is fair to: what the client calls itself, or where it connects from."""
    named = headers.get("x-client-id", "")
    if _CLIENT.fullmatch(named):
        return f"name {named}"
    return f"host {(scope.get('client') or ('', 0))[0]}"


def _unauthorized(request_id: str) -> Response:
    message = "Authorization: expected the server's key as a bearer token"
    return error_response(401, message, request_id, {"www-authenticate": "Bearer"})


def error_response(status: int, message: str, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as the body that clients of OpenAI's API read."""
    error = {"message": message, "type": _KINDS.get(status, "Error"), "code": status, "request_id": request_id}
    return Response(orjson.dumps({"error": error}), status, dict(headers or {}), "application/json")


def response_to(error: Exception, request_id: str) -> Response:
    """The answer to a request that the package's own errors end."""
    if isinstance(error, ServerBusyError):
        return error_response(503, str(error), request_id, {"retry-after": str(error.retry_after)})
    if isinstance(error, ServerStoppingError):
        return error_response(503, str(error), request_id, {"retry-after": "1", "connection": "close"})
    if isinstance(error, RequestError):
        return error_response(error.status, str(error), request_id)
    if isinstance(error, RecordError | VheadError | ValueError):
        return error_response(400, str(error), request_id)
    raise error


def _log(scope: Scope, route: str, status: int, seconds: float, state: Mapping[str, Any]) -> None:
    fields = {name: state[name] for name in ("request_id", "client", "rollouts", "tokens") if name in state}
    fields |= {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 4)}
    logger.info("%s %s %d", scope["method"], route, status, extra={"fields": fields})
