"""Bodies of requests: received within limits, and read as JSON."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from vhead.errors import RequestError, ServerBusyError
from vhead.serve.limits import RequestLimits

JSON = "application/json"
Body = TypeVar("Body")


class Receiver:
    """Receives bodies; all of them together have bounded memory.

    Args:
        limits: Of a body, and of all.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, for as long as it is needed.

        Raises:
            RequestError: It is too large, compressed, or does not arrive in time or whole.
            ServerBusyError: There is no room for it.
        """
        coding = request.headers.get("content-encoding", "identity")
        if coding != "identity":
            raise RequestError(f"Content-Encoding: expected an uncompressed body, got {coding[:40]!r}", 415)
        stated = request.headers.get("content-length", "0")
        self._check_size(int(stated[:20]) if stated.isdecimal() else 0)
        parts: list[bytes] = []
        try:
            await self._receive(request, parts)
            yield b"".join(parts)
        finally:
            self._held -= sum(map(len, parts))

    async def _receive(self, request: Request, parts: list[bytes]) -> None:
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    self._held += len(part)
                    self._check_size(size)
        except TimeoutError:
            raise RequestError(f"the body did not arrive within {self._limits.body_s:g} s", 408) from None
        except ClientDisconnect:
            raise RequestError("the body ended early") from None

    def _check_size(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise RequestError(f"the body: expected at most {self._limits.body_bytes} bytes, got more", 413)
        if self._held > self._limits.bodies_bytes:
            raise ServerBusyError("the server is receiving as many bytes as it has room for; try again later")


def media_type(header: str | None) -> str:
    """The media type in a header, without its parameters; JSON where there is none."""
    return (header or JSON).partition(";")[0].strip().lower()


def check_json(request: Request) -> None:
    """Checks that a body says that it is JSON, or nothing.

    Raises:
        RequestError: It says something else.
    """
    kind = media_type(request.headers.get("content-type"))
    if kind != JSON:
        raise RequestError(f"Content-Type: expected {JSON}, got {kind[:60]!r}", 415)


def decoded(body: bytes, kind: type[Body]) -> Body:
    """The body as an object of a class of msgspec's.

    Raises:
        RequestError: It is no JSON, or something else.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except RecursionError:
        raise RequestError("the body: expected JSON that is not nested as deeply") from None
    except msgspec.ValidationError as error:
        raise RequestError(f"the body: {_sentence(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body: expected JSON: {_sentence(error)}") from None


def _sentence(error: Exception) -> str:
    text = str(error)
    # Not JSON, which is written so inside a sentence too.
    first = text[:1] if text[1:2].isupper() else text[:1].lower()
    return f"{first}{text[1:300]}"


def schema(kind: Any) -> dict[str, Any]:
    """What OpenAPI says of a body of this class, for `openapi_extra`."""
    ((own,), _) = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
    return {"requestBody": {"required": True, "content": {JSON: {"schema": own}}}}
