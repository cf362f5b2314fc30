"""A server as a process: its address, its log, and its end."""

import asyncio
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from vhead.serve.app import make_app
from vhead.serve.connections import protocol
from vhead.serve.service import Service

logger = logging.getLogger("vhead.serve")

# Connections that are open at one moment; beyond it, the next one is answered with 503.
_CONNECTIONS = 4096
_BACKLOG = 2048
_KEEP_ALIVE_S = 30
_LOOK_S = 0.05
_SIGNALS_S = 0.2
# For requests to notice that their connections have been ended.
_FAREWELL_S = 1.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, and who may come.

    Attributes:
        host: A name or an address of this machine.
        port: 0: any that is free.
        api_key: What clients have to send.
        certificate: A file with a certificate, for TLS.
        private_key: A file with its key, where the certificate's does not hold it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether other machines cannot reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def bound(self) -> socket.socket:
        """A socket that has the address and does not listen yet.

        Raises:
            OSError: The address is not this machine's, or taken.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(family)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((self.host, self.port))
        except OSError as error:
            bound.close()
            raise OSError(error.errno, error.strerror, f"{self.host}:{self.port}") from None
        return bound

    def url(self, bound: socket.socket) -> str:
        """What clients write."""
        scheme = "http" if self.certificate is None else "https"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{bound.getsockname()[1]}"


class _Draining(uvicorn.Server):
    """Uvicorn with an end of its own, which knows the requests that it leaves without a whole answer.

    Uvicorn's own cancels what is unanswered after the time, and then looks like one that has answered everything.

    Args:
        config: As uvicorn takes it.
        drain_s: Seconds for answers to go out.

    Attributes:
        unanswered: How many requests came whole and had not got a whole answer when their connections were ended.
    """

    def __init__(self, config: uvicorn.Config, drain_s: float) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self.unanswered = 0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections, and ends those that are there: with their answers, or when the time is over."""
        for listening in (*self.servers, *(sockets or ())):
            listening.close()
        connections: Any = self.server_state.connections
        for connection in list(connections):
            connection.shutdown()
        await self._wait(connections, self._drain_s, lambda: self.force_exit)
        self.unanswered = sum(connection.owes_an_answer for connection in connections)
        for connection in list(connections):
            connection.transport.abort()
        await self._wait(self.server_state.tasks, _FAREWELL_S)

    @staticmethod
    async def _wait(what: Sized, most_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        until = time.monotonic() + most_s
        while what and not is_over() and time.monotonic() < until:
            await asyncio.sleep(_LOOK_S)


class Server:
    """A server that runs in a thread until it is told to stop.

    Connections are taken from its beginning on, and wait for `run`.

    Args:
        service: The model; it is closed at the end.
        address: Where it listens.
        bound: The address's socket.
        drain_s: Seconds that requests which were accepted have to be answered, when the server stops.

    Raises:
        OSError: A file of TLS cannot be read, or holds something else.
    """

    def __init__(self, service: Service, address: Address, bound: socket.socket, drain_s: int = 60) -> None:
        self._service, self._bound, self._drain_s = service, bound, drain_s
        config = uvicorn.Config(
            make_app(service, address.api_key),
            http=protocol(service.limits.body_s, _CONNECTIONS),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            ssl_certfile=address.certificate,
            ssl_keyfile=address.private_key,
        )
        config.load()
        self._server = _Draining(config, drain_s)
        # Signals come to the main thread, which has nothing else to do.
        self._thread = threading.Thread(target=self._server.run, args=([bound],), name="vhead-http", daemon=True)
        bound.listen(_BACKLOG)

    def stop(self) -> None:
        """Takes no more connections, and ends when what was accepted is answered; at once when it is called again."""
        self._server.force_exit = self._server.should_exit
        self._server.should_exit = True

    def run(self) -> bool:
        """Serves until `stop` is called.

        Returns:
            Whether all that was accepted has been answered, to the last byte.
        """
        self._thread.start()
        while self._thread.is_alive():
            # The system may hand a signal to any thread; Python answers it in the main one, when that does something.
            self._thread.join(_SIGNALS_S)
        self._bound.close()
        if unanswered := self._server.unanswered:
            logger.warning("accepted requests that were ended without a whole answer: %d", unanswered)
        is_late = unanswered or self._server.force_exit
        return self._service.close(0.0 if is_late else float(self._drain_s)) and not unanswered


class JsonLines(logging.Formatter):
    """Each record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record: when, how grave, what, and the fields of a request."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{when}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
