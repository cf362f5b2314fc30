"""From a request's rollouts to its scores: into the queue, and out of it again when the client leaves."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vhead.errors import RecordError, RequestError, VheadError
from vhead.scoring.scores import Scores
from vhead.serve.bodies import Receiver
from vhead.serve.entrance import CLIENT_GONE, response_to
from vhead.serve.models import Prepared
from vhead.serve.service import Service


class ClientGoneError(VheadError):
    """Nobody waits for the answer any more."""


class Answering:
    """Answers requests of every protocol.

    Args:
        service: The model.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._receiver = Receiver(service.limits)

    async def reply(
        self,
        request: Request,
        prepare: Callable[[bytes], Prepared],
        reply: Callable[[Prepared, Scores], Response],
    ) -> Response:
        """The answer to a request.

        Args:
            request: Its body is read here.
            prepare: Makes rollouts of the body, and says what is wrong with it.
            reply: Makes the answer of the scores.
        """
        try:
            self.service.batcher.check_open()
            async with self._receiver.body(request) as body:
                # Those who are refused cost those who wait no more than this.
                self.service.batcher.check_room()
                prepared = await self.service.read(prepare, body)
            request.state.rollouts, request.state.tokens = len(prepared.rollouts), prepared.tokens
            future = self.service.submit(prepared, request.state.client, request.state.request_id)
            del body
            scores = await self._result(request, future)
            return await self.service.read(reply, prepared, scores)
        except ClientGoneError:
            self.service.metrics.cancelled()
            return Response(status_code=CLIENT_GONE)
        except (VheadError, ValueError) as error:
            return response_to(error, request.state.request_id)

    async def plain(self, request: Request, reply: Callable[[bytes], Response]) -> Response:
        """The answer to a request that needs no scores."""
        try:
            async with self._receiver.body(request) as body:
                return await self.service.read(reply, body)
        except (VheadError, ValueError) as error:
            return response_to(error, request.state.request_id)

    async def received(self, request: Request) -> bytes:
        """The body of a request that brings no rollouts.

        Raises:
            RequestError: It is too large, or does not arrive.
            ServerBusyError: There is no room for it.
        """
        async with self._receiver.body(request) as body:
            return body

    async def _result(self, request: Request, future: Future[Scores]) -> Scores:
        """The scores when they are there; a client that leaves takes its rollouts out of the queue."""
        scores = asyncio.wrap_future(future)
        gone = asyncio.ensure_future(_gone(request))
        limit = self.service.limits.answer_s
        try:
            first: set[asyncio.Future[Any]] = {scores, gone}
            await asyncio.wait(first, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if scores.done():
                return scores.result()
            if gone.done():
                raise ClientGoneError
            raise RequestError(f"the scores were not there within {limit:g} s, and are no longer computed", 504)
        except RecordError as error:
            # What was sent has been checked before, so that this is about the model.
            raise RequestError(f"the model failed: {error}", 500) from error
        finally:
            gone.cancel()
            scores.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
