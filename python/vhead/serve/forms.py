"""How a client writes rollouts and reads scores: as streams of Arrow where pyarrow is there, or as JSON."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from vhead.rollouts import Rollout
from vhead.scoring.fields import WEIGHTS_STEP
from vhead.scoring.scores import TRUNCATED, Scores
from vhead.serve.protocols import arrow, npy

JSON = "application/json"
# Arrays that are not fields.
_BESIDE = ("prompt_lengths", "offsets", "mask", "step_offsets")
_BYTES_OF_A_TOKEN, _BYTES_OF_A_CHARACTER = 8, 4


@dataclass(frozen=True)
class Post:
    """A request: where it goes, what its body is, and of which kind."""

    path: str
    body: bytes
    media_type: str


def size_of(rollout: Rollout) -> tuple[int, int]:
    """About how many bytes a rollout has in a body, and how many tokens, where they are known."""
    if rollout.kind != "token ids":
        parts = (rollout.prompt, rollout.completion, rollout.tools or "")
        return _BYTES_OF_A_CHARACTER * sum(len(part if isinstance(part, str) else str(part)) for part in parts), 0
    tokens = len(rollout.prompt) + len(rollout.completion)
    candidates = 0 if rollout.candidates is None else rollout.candidates.size
    return _BYTES_OF_A_TOKEN * (tokens + candidates), tokens


def post(rollouts: Sequence[Rollout], asked: Mapping[str, Any], *, as_arrow: bool) -> Post:
    """The request for the scores of rollouts; chats are JSON in any case, and so is a mixture."""
    kinds = {rollout.kind for rollout in rollouts}
    if as_arrow and len(kinds) == 1 and kinds <= {"token ids", "text"}:
        query = {**asked, "returns": ",".join(asked["returns"])} if "returns" in asked else asked
        return Post(f"/score?{urlencode(query)}", arrow.stream_of_rollouts(rollouts), arrow.MEDIA_TYPE)
    body = {**asked, "rollouts": [_record(rollout) for rollout in rollouts]}
    return Post("/score", json.dumps(body, default=list).encode(), JSON)


def _record(rollout: Rollout) -> dict[str, Any]:
    """A rollout as a JSON body has it; its id stays here."""
    if rollout.kind != "token ids":
        record = {"prompt": rollout.prompt, "completion": rollout.completion}
        return record if rollout.tools is None else {**record, "tools": rollout.tools}
    arrays: dict[str, Any] = {"prompt_ids": rollout.prompt, "completion_ids": rollout.completion}
    arrays |= {"completion_mask": rollout.mask, "candidates": rollout.candidates}
    return {name: npy.encoded(array) for name, array in arrays.items() if array is not None}


def scores_in(content: bytes, media_type: str, rollouts: Sequence[Rollout], first: int) -> Scores:
    """The scores in an answer, of rollouts from one place on."""
    if media_type == arrow.MEDIA_TYPE:
        arrays, step = arrow.arrays(content)
    else:
        answer = json.loads(content)
        arrays, step = {name: _array(text) for name, text in answer["arrays"].items()}, answer["step"]
    company: dict[str, Any] = {name: arrays.pop(name, None) for name in (*_BESIDE, TRUNCATED)}
    if step is not None and WEIGHTS_STEP not in arrays:
        arrays[WEIGHTS_STEP] = np.full(len(rollouts), step, np.int64)
    ids, indices = tuple(rollout.id for rollout in rollouts), np.arange(first, first + len(rollouts))
    return Scores(ids=ids, indices=indices, computed=arrays, **company)


def _array(text: str) -> NDArray[Any]:
    found: NDArray[Any] = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    return found
