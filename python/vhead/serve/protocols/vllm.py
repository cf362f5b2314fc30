"""The protocols of vLLM that reward clients speak: `/classify`, `/pooling`, `/v1/embeddings` and `/tokenize`."""

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter
from msgspec import Meta, Struct
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from vhead.errors import RequestError
from vhead.scoring.scores import Scores
from vhead.serve.answering import Answering
from vhead.serve.bodies import JSON, check_json, decoded, schema
from vhead.serve.models import Prepared, ServedModel
from vhead.serve.protocols.sequences import (
    AT_EACH_TOKEN,
    AT_THE_END,
    Input,
    all_token_ids,
    check_count,
    parts_of,
    prepared,
    token_ids,
)
from vhead.serve.service import Service

Encoding = Literal["float", "base64", "bytes"]
Outputs = list[NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """The head's outputs for the sequences of a request, `[K]` or `[N, K]` each, and the step of the weights."""

    given: Prepared
    outputs: Outputs
    step: int | None


class PoolingBody(Struct):
    """What these protocols have in common; fields that do not change the numbers are passed over."""

    input: Input | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None
    task: Literal["classify", "token_classify"] = "classify"
    encoding_format: Encoding = "float"
    use_activation: bool | None = None
    activation: bool | None = None
    add_generation_prompt: bool = False
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    add_special_tokens: bool = True
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "native"
    dimensions: None = None


class TokenizeBody(Struct):
    """A text or a chat that is to become token ids."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True


class PoolingRoutes:
    """These protocols on a model. What they give is the head's raw output, unless an activation is asked for."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._service: Service = answering.service

    async def answer(
        self,
        request: Request,
        write: Callable[[PoolingBody, Pooled], Response],
        tasks: tuple[str, ...] = ("classify",),
    ) -> Response:
        """One request for one of these tasks, whose answer `write` makes of the head's outputs."""
        check_json(request)
        asked = PoolingBody()

        def prepare(body: bytes) -> Prepared:
            nonlocal asked
            asked = decoded(body, PoolingBody)
            if asked.task not in tasks:
                raise RequestError(f"task: expected {' or '.join(tasks)}, got {asked.task}, which /pooling takes")
            model = self._service.model(asked.model)
            sequences, names = _sequences(model, asked)
            return prepared(model, sequences, names, AT_THE_END if asked.task == "classify" else AT_EACH_TOKEN)

        def reply(given: Prepared, scores: Scores) -> Response:
            activates = asked.activation if asked.use_activation is None else asked.use_activation
            outputs = _at_the_end(scores) if asked.task == "classify" else _at_each_token(scores)
            return write(
                asked, Pooled(given, [_activated(one) for one in outputs] if activates else outputs, given.step(scores))
            )

        return await self._answering.reply(request, prepare, reply)

    def classified(self, asked: PoolingBody, pooled: Pooled) -> Response:
        """What `/classify` answers."""
        data = [
            {"index": place, "label": f"LABEL_{int(one.argmax())}", "probs": one, "num_classes": len(one)}
            for place, one in enumerate(pooled.outputs)
        ]
        return self._listed("classify", pooled, data)

    def embedded(self, asked: PoolingBody, pooled: Pooled) -> Response:
        """What `/v1/embeddings` answers."""
        return self._pooled(asked, pooled, "embedding", "embedding")

    def pooled(self, asked: PoolingBody, pooled: Pooled) -> Response:
        """What `/pooling` answers."""
        return self._pooled(asked, pooled, "pooling", "data")

    def _pooled(self, asked: PoolingBody, pooled: Pooled, kind: str, field: str) -> Response:
        if asked.encoding_format == "bytes":
            return self._raw(kind, pooled)
        encode: Callable[[Any], object] = _base64 if asked.encoding_format == "base64" else (lambda one: one)
        data = [{"index": place, "object": kind, field: encode(one)} for place, one in enumerate(pooled.outputs)]
        return self._listed(kind, pooled, data)

    def _head(self, kind: str, pooled: Pooled) -> dict[str, Any]:
        tokens = pooled.given.tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        about = {"created": int(time.time()), "model": pooled.given.model.name, "step": pooled.step}
        return {"id": f"{kind}-{time.time_ns():x}", **about, "usage": usage}

    def _listed(self, kind: str, pooled: Pooled, data: list[dict[str, Any]]) -> Response:
        content = {**self._head(kind, pooled), "object": "list", "data": data}
        return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON)

    def _raw(self, kind: str, pooled: Pooled) -> Response:
        """The numbers one after the other, little-endian, and in a header where each sequence's are."""
        data, start = [], 0
        for place, one in enumerate(pooled.outputs):
            where = {"start": start, "end": start + one.nbytes, "shape": list(one.shape)}
            data.append({"index": place, "embed_dtype": "float32", "endianness": "little", **where})
            start += one.nbytes
        headers = {"metadata": json.dumps({**self._head(kind, pooled), "data": data})}
        content = b"".join(one.astype("<f4").tobytes() for one in pooled.outputs)
        return Response(content, headers=headers, media_type="application/octet-stream")

    async def tokenized(self, request: Request) -> Response:
        """What `/tokenize` answers."""
        check_json(request)
        return await self._answering.plain(request, self._tokenized)

    def _tokenized(self, body: bytes) -> Response:
        asked = decoded(body, TokenizeBody)
        model = self._service.model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise RequestError("prompt: expected either prompt or messages")
        _check_special_tokens(add=asked.add_special_tokens, given=asked.prompt)
        model.check_texts([asked.prompt, asked.messages])
        if asked.messages is not None:
            ids = token_ids(model, asked.messages, "messages", generation_prompt=asked.add_generation_prompt)
        else:
            ids = token_ids(model, asked.prompt or "", "prompt")
        limit = model.scorer.encoder.limit.tokens
        content = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None}
        return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON)


def _sequences(model: ServedModel, asked: PoolingBody) -> tuple[list[Any], list[str]]:
    if (asked.input is None) == (asked.messages is None):
        raise RequestError("input: expected either input or messages")
    _check_special_tokens(add=asked.add_special_tokens, given=asked.input)
    if asked.messages is not None:
        model.check_texts(asked.messages)
        options = {"generation_prompt": asked.add_generation_prompt}
        sequences, names = [token_ids(model, asked.messages, "messages", **options)], ["messages"]
    else:
        parts = parts_of(asked.input or [], "input")
        check_count(model, parts, "input")
        names = [f"input[{place}]" for place in range(len(parts))]
        sequences = all_token_ids(model, parts, names)
    if (kept := asked.truncate_prompt_tokens) is not None:
        kept = (model.scorer.encoder.limit.tokens or 0) if kept < 0 else max(kept, 1)
        sequences = [ids[-kept:] for ids in sequences]
    return sequences, names


def _check_special_tokens(*, add: bool, given: object) -> None:
    """A chat's text has them from the template, whatever is asked for, and token ids are as they are."""
    if not add and (isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], str))):
        expected = "true, because a text is scored with the tokens that the tokenizer puts in front of it"
        raise RequestError(f"add_special_tokens: expected {expected}; send token ids for other tokens")


def _at_the_end(scores: Scores) -> Outputs:
    return list(scores.reward.reshape(len(scores), -1))


def _at_each_token(scores: Scores) -> Outputs:
    outputs = []
    for place, last in enumerate(scores.bootstrap.reshape(len(scores), -1)):
        values = scores.values[scores.offsets[place] : scores.offsets[place + 1]]
        outputs.append(np.concatenate([values.reshape(len(values), -1), last[None]]))
    return outputs


def _activated(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities: of one output by the logistic function, of several by softmax."""
    if outputs.shape[-1] == 1:
        # Without overflow, however small the output is.
        small = np.exp(-np.abs(outputs))
        return np.where(outputs >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
    exponentials = np.exp(outputs - outputs.max(-1, keepdims=True))
    probabilities: NDArray[np.float32] = exponentials / exponentials.sum(-1, keepdims=True)
    return probabilities


def _base64(outputs: NDArray[np.float32]) -> str:
    return base64.b64encode(outputs.astype("<f4").tobytes()).decode("ascii")


def router(answering: Answering) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["vLLM"])
    own = PoolingRoutes(answering)
    body = schema(PoolingBody)

    @routes.post("/classify", summary="The head's outputs at the last token, as class scores", openapi_extra=body)
    async def classify(request: Request) -> Response:
        """The protocol of vLLM's and SGLang's `/classify`, which verl's reward loop reads."""
        return await own.answer(request, own.classified)

    @routes.post("/v1/embeddings", summary="The head's outputs at the last token, as an embedding", openapi_extra=body)
    async def embeddings(request: Request) -> Response:
        """The protocol of OpenAI's embeddings, from which verl's reward loop reads rewards."""
        return await own.answer(request, own.embedded)

    @routes.post("/pooling", summary="The head's outputs at the last token, or at each token", openapi_extra=body)
    async def pooling(request: Request) -> Response:
        """The protocol of vLLM's `/pooling`, for the tasks `classify` and `token_classify`."""
        return await own.answer(request, own.pooled, ("classify", "token_classify"))

    @routes.post("/tokenize", summary="Token ids of a text or a chat", openapi_extra=schema(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        """The protocol of vLLM's `/tokenize`."""
        return await own.tokenized(request)

    return routes
