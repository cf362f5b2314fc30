"""Connections: those whose requests do not arrive, and those that still have an answer to take."""

import asyncio
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vhead.serve.entrance import error_response


def protocol(timeout_s: float, most: int) -> type[H11Protocol]:
    """A protocol for uvicorn that ends a connection on which part of a request came, and the rest does not.

    Bodies that somebody waits for have a time of their own; what is meant are headers, and what is left of a body after
    its request was refused.

    Args:
        timeout_s: Seconds for a header, from the connection or the first byte after an answer on.
        most: Connections that are open at one moment; beyond it, requests are answered with 503.
    """
    return type("Protocol", (_Impatient,), {"timeout_s": timeout_s, "most": most})


class _Impatient(H11Protocol):
    timeout_s: float
    most: int
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._within: Any = self.app
        self.app = self._admitted

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self.connections) <= self.most:
            await self._within(scope, receive, send)
            return
        message = f"the server has more than {self.most} connections; try again later"
        headers = {"retry-after": "1", "connection": "close"}
        await error_response(503, message, "", headers)(scope, receive, send)

    @property
    def owes_an_answer(self) -> bool:
        """Whether a request came whole, and its answer has not gone out whole.

        An answer is complete for uvicorn when it is in the transport's buffer, however slowly its reader takes it out.
        """
        cycle = self.cycle
        if cycle is None or cycle.more_body:
            return False
        return not cycle.response_complete or self.transport.get_write_buffer_size() > 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The clock runs from when part of a request is there until all of it is; more bytes do not set it back."""
        if not self._is_unfinished():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.timeout_s, self._give_up)

    def _is_unfinished(self) -> bool:
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            return False
        is_first = self.cycle is None
        return is_first or self.conn.their_state is not h11.IDLE or bool(self.conn.trailing_data[0])

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.conn.our_state is h11.IDLE and self.conn.their_state is h11.IDLE:
            self._refuse(408, b"Request Timeout", "the request's header did not arrive in time")
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Uvicorn calls this where h11 cannot read what came."""
        self._refuse(400, b"Bad Request", "expected a request of HTTP/1.1 with a header of at most 64 KiB")

    def _refuse(self, status: int, reason: bytes, message: str) -> None:
        """Answers what the application never sees, in the form of all errors, and ends the connection."""
        headers = [("content-type", "application/json"), ("connection", "close")]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=reason),
            h11.Data(data=bytes(error_response(status, message, "").body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
