"""Clients of `vhead serve`: rollouts go out in requests, and come back as the `Scores` that a scorer gives.

What is asked, how an answer is taken and when it is asked again is said once, in `_Asking`. `AsyncClient` awaits its
coroutines. `Client` runs each in a thread, where sending and pausing block, so that nothing is ever awaited.
"""

import asyncio
import importlib
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Event
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vhead.errors import MissingExtraError, RecordError, ServerError
from vhead.rollouts import Rollout
from vhead.scoring.fields import COLUMNS, DEFAULT_RETURNS
from vhead.scoring.scores import Scores
from vhead.serve.forms import JSON, Post, post, scores_in, size_of
from vhead.serve.protocols import arrow, npy

# Of one request; the server's own limits are above these unless its operator says otherwise.
_BYTES, _TOKENS = 4 << 20, 1 << 16
# Answers that say: not now. The second is what proxies say while a server is away, and 504 comes from the server alone.
_BUSY = (429, 502, 503)
_LONGEST_PAUSE_S = 10.0
_CONNECT_S = 10.0
_PLACE = re.compile(r"^rollouts\[(\d+)\]")


@dataclass(frozen=True)
class _Piece:
    """Some rollouts that follow one another.

    Attributes:
        first: The place of the first among all.
        rollouts: At least one.
    """

    first: int
    rollouts: Sequence[Rollout]

    def halves(self) -> tuple["_Piece", "_Piece"]:
        middle = len(self.rollouts) // 2
        first, second = self.rollouts[:middle], self.rollouts[middle:]
        return _Piece(self.first, first), _Piece(self.first + middle, second)


# Sends, and gives the answer, or the error that came instead; and waits for so many seconds.
_Send = Callable[[Post], Awaitable[Any]]
_Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class _Asking:
    """What one call asks for.

    Attributes:
        asked: What each request says beside the rollouts.
        rollouts: The most of a request.
        patience: Seconds for a request and all its repetitions.
        where: The server's address, for messages.
        as_arrow: Whether rollouts go out as streams of Arrow's.
    """

    asked: dict[str, Any]
    rollouts: int
    patience: float
    where: str
    as_arrow: bool

    def pieces(self, rollouts: Iterable[Rollout]) -> Iterator[_Piece]:
        """The rollouts in pieces of as many as a request may have."""
        waiting: list[Rollout] = []
        first = size = tokens = 0
        for place, rollout in enumerate(rollouts):
            more, count = size_of(rollout)
            is_full = size + more > _BYTES or tokens + count > _TOKENS or len(waiting) == self.rollouts
            if waiting and is_full:
                yield _Piece(first, waiting)
                first, waiting, size, tokens = place, [], 0, 0
            waiting.append(rollout)
            size, tokens = size + more, tokens + count
        if waiting:
            yield _Piece(first, waiting)

    def joined(self, parts: Iterable[list[Scores]]) -> Scores:
        """The scores of all pieces; a server is not asked about no rollouts."""
        return Scores.concat([scores for part in parts for scores in part] or [self._nothing()])

    def _nothing(self) -> Scores:
        returns, none = self.asked.get("returns", DEFAULT_RETURNS), np.zeros(0, np.int64)
        columns = [column for column in COLUMNS.values() if column.returned_as in returns]
        computed = {column.name: np.zeros((0, *(column.width or ())), column.dtype) for column in columns}
        offsets = np.zeros(1, np.int64)
        return Scores((), none, none, offsets, computed, step_offsets=offsets if "steps" in computed else None)

    async def scored(self, piece: _Piece, send: _Send, sleep: _Sleep) -> list[Scores]:
        """Asks until the piece's scores are there.

        Raises:
            RecordError: The server cannot score a rollout; it is named by its place among all.
            ServerError: The server refuses, or did not answer in time.
        """
        request = post(piece.rollouts, self.asked, as_arrow=self.as_arrow)
        until, attempt = time.monotonic() + self.patience, 0
        while True:
            told = await send(request)
            error: ServerError | RecordError
            if isinstance(told, Exception):
                pause, error = 0.0, _no_answer(self.where, told)
            elif told.status_code == 200:
                return [self._scores(told, piece)]
            elif told.status_code == 413 and len(piece.rollouts) > 1:
                return [part for half in piece.halves() for part in await self.scored(half, send, sleep)]
            elif told.status_code == 415 and request.media_type != JSON:
                # A server without pyarrow.
                return await replace(self, as_arrow=False).scored(piece, send, sleep)
            else:
                pause, error = _asked_pause(told), self._refusal(told, piece)
                if told.status_code not in _BUSY:
                    raise error
            # Clients that were refused together do not come back together.
            pause = max(pause, min(0.1 * 2.0**attempt, _LONGEST_PAUSE_S)) * random.uniform(1.0, 1.25)  # noqa: S311
            if time.monotonic() + pause > until:
                raise error
            await sleep(pause)
            attempt += 1

    def _scores(self, answer: Any, piece: _Piece) -> Scores:
        try:
            return scores_in(answer.content, answer.headers.get("content-type", ""), piece.rollouts, piece.first)
        except (ValueError, KeyError, OSError) as error:
            # Whatever stands between cut it off, or has answered in the server's place.
            message = f"{self.where}: expected scores in the answer, which is cut off or another one: {error}"
            raise ServerError(message, status=200, request_id=answer.headers.get("x-request-id")) from error

    def _refusal(self, answer: Any, piece: _Piece) -> ServerError | RecordError:
        said, request_id = _error_of(answer)
        if answer.status_code in (400, 422) and (found := _PLACE.match(said)):
            place = piece.first + int(found[1])
            return RecordError(f"rollouts[{place}]{said[found.end() :]}", record=place)
        return ServerError(f"{self.where}: {said}", status=answer.status_code, request_id=request_id)


class _Settings:
    """What both clients are given, and have in common."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float = 600.0,
        rollouts_per_request: int = 256,
        concurrency: int = 8,
        **options: Any,
    ) -> None:
        for name, number in (("rollouts_per_request", rollouts_per_request), ("concurrency", concurrency)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}: expected a whole number of 1 or more, got {number!r}")
        if not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
        self.url = url.rstrip("/")
        self._model = model
        self._timeout = timeout
        self._rollouts = rollouts_per_request
        self._concurrency = concurrency
        self._as_arrow = arrow.is_there()
        headers = {"accept": f"{arrow.MEDIA_TYPE}, {npy.MEDIA_TYPE}" if self._as_arrow else npy.MEDIA_TYPE}
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key}"
        self._httpx = _httpx()
        self._options = {
            "base_url": self.url,
            "headers": headers,
            "timeout": self._httpx.Timeout(timeout, connect=min(timeout, _CONNECT_S)),
            "limits": self._httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            **options,
        }

    def _asking(self, returns: Sequence[str] | None, temperature: float, top_logprobs: int) -> _Asking:
        asked = {
            "returns": None if returns is None else list(returns),
            "model": self._model,
            "temperature": temperature,
            "top_logprobs": top_logprobs,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        return _Asking(given, self._rollouts, self._timeout, self.url, self._as_arrow)

    def _names(self, answer: Any) -> list[str]:
        if isinstance(answer, Exception):
            raise _no_answer(self.url, answer) from answer
        if answer.status_code != 200:
            said, request_id = _error_of(answer)
            raise ServerError(f"{self.url}: {said}", status=answer.status_code, request_id=request_id)
        return [str(one["id"]) for one in answer.json()["data"]]


class Client(_Settings):
    """Scores rollouts on a server, and gives what `Scorer.score` would give there.

    Requests of one call go out together, so that the server can put them into batches with each other. What is refused
    because the server is busy, or gets no answer, is asked again, as late as the server says at the earliest. Threads
    may share a client.

    Args:
        url: The server's address, such as `http://127.0.0.1:8000`.
        api_key: What the server wants to know before it lets anybody in.
        model: The served model's name; None: the server's first.
        timeout: Seconds for a request, repetitions and pauses among them.
        rollouts_per_request: The most rollouts of a request. Those that share a prompt belong side by side.
        concurrency: The most requests at a time.
        **options: More for `httpx2.Client`, such as `verify` or `transport`.

    Raises:
        MissingExtraError: httpx2 is not installed.
        ValueError: A number is out of range.
    """

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._client = self._httpx.Client(**self._options)

    def score(
        self,
        rollouts: Iterable[Rollout],
        returns: Sequence[str] | None = None,
        temperature: float = 1.0,
        *,
        top_logprobs: int = 0,
    ) -> Scores:
        """Scores all rollouts.

        Args:
            rollouts: Text, token ids with masks and candidates, or messages.
            returns: As `Scorer.score` takes them; None: what the server gives by default.
            temperature: Raw logits are divided by it before log-probabilities and entropies are taken.
            top_logprobs: How many of the likeliest tokens are wanted at each position.

        Returns:
            Flat arrays with offsets, in the rollouts' order; `weights_step` is among them where the server knows it.

        Raises:
            RecordError: A rollout cannot be scored; `record` is its place.
            ServerError: The server refuses, or did not answer in time.
        """
        asking = self._asking(returns, temperature, top_logprobs)
        left = Event()
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="vhead-client") as threads:
            try:
                pending = [threads.submit(self._asked, asking, piece, left) for piece in asking.pieces(rollouts)]
                return asking.joined(future.result() for future in pending)
            finally:
                # After an error nobody waits for the others' pauses.
                left.set()
                threads.shutdown(wait=False, cancel_futures=True)

    def rewards(self, rollouts: Iterable[Rollout]) -> NDArray[np.float32]:
        """The rewards of all rollouts alone, float32 `[N]`, or `[N, K]` for K outputs; as `score` otherwise."""
        return self.score(rollouts, ("reward",)).reward

    def models(self) -> list[str]:
        """The names under which the server has its models.

        Raises:
            ServerError: The server refuses, or does not answer.
        """
        return self._names(self._sent("GET", "/v1/models"))

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _asked(self, asking: _Asking, piece: _Piece, left: Event) -> list[Scores]:
        async def send(request: Post) -> Any:
            return self._sent("POST", request.path, request.body, request.media_type)

        async def sleep(seconds: float) -> None:
            if left.wait(seconds):
                raise ServerError(f"{self.url}: another request of this call failed")

        return _done(asking.scored(piece, send, sleep))

    def _sent(self, method: str, path: str, body: bytes | None = None, media_type: str = JSON) -> Any:
        try:
            return self._client.request(method, path, content=body, headers={"content-type": media_type})
        except self._httpx.TransportError as error:
            return error


class AsyncClient(_Settings):
    """`Client` for programs with an event loop: the same arguments, and `score` and `models` to be awaited."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._client = self._httpx.AsyncClient(**self._options)

    async def score(
        self,
        rollouts: Iterable[Rollout],
        returns: Sequence[str] | None = None,
        temperature: float = 1.0,
        *,
        top_logprobs: int = 0,
    ) -> Scores:
        """Scores all rollouts; as `Client.score`. A call that is cancelled takes its requests back."""
        asking = self._asking(returns, temperature, top_logprobs)
        turn = asyncio.Semaphore(self._concurrency)
        tasks = [asyncio.create_task(self._asked(asking, piece, turn)) for piece in asking.pieces(rollouts)]
        try:
            return asking.joined(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def rewards(self, rollouts: Iterable[Rollout]) -> NDArray[np.float32]:
        """The rewards of all rollouts alone; as `Client.rewards`."""
        return (await self.score(rollouts, ("reward",))).reward

    async def models(self) -> list[str]:
        """The names under which the server has its models; as `Client.models`."""
        return self._names(await self._sent("GET", "/v1/models"))

    async def aclose(self) -> None:
        """Closes its connections."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _asked(self, asking: _Asking, piece: _Piece, turn: asyncio.Semaphore) -> list[Scores]:
        async def send(request: Post) -> Any:
            return await self._sent("POST", request.path, request.body, request.media_type)

        async with turn:
            return await asking.scored(piece, send, asyncio.sleep)

    async def _sent(self, method: str, path: str, body: bytes | None = None, media_type: str = JSON) -> Any:
        try:
            return await self._client.request(method, path, content=body, headers={"content-type": media_type})
        except self._httpx.TransportError as error:
            return error


def _httpx() -> Any:
    try:
        return importlib.import_module("httpx2")
    except ImportError as error:
        raise MissingExtraError("httpx2", "client") from error


def _done(work: Coroutine[Any, Any, list[Scores]]) -> list[Scores]:
    """What a coroutine gives that never awaits anything but what is there at once."""
    try:
        work.send(None)
    except StopIteration as done:
        scores: list[Scores] = done.value
        return scores
    raise RuntimeError("expected a coroutine that is done at once, got one that waits for an event loop")


def _no_answer(where: str, error: Exception) -> ServerError:
    return ServerError(f"{where}: no answer: {type(error).__name__}: {error}")


def _asked_pause(answer: Any) -> float:
    """The seconds after which the server would like to be asked again; 0 where it does not say."""
    with suppress(ValueError):
        return max(0.0, float(answer.headers.get("retry-after", "0")))
    return 0.0


def _error_of(answer: Any) -> tuple[str, str | None]:
    """What a server says of a refusal, and the request's id."""
    said = f"HTTP {answer.status_code}"
    with suppress(ValueError, KeyError, TypeError):
        said = str(answer.json()["error"]["message"])
    return said, answer.headers.get("x-request-id")
