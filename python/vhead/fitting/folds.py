"""Which fold a prompt belongs to: all rollouts of one prompt are held out together."""

import hashlib
import json
from collections.abc import Iterable

import numpy as np

from vhead.rollouts.rollout import Rollout

_DIGEST_BYTES = 8


def prompt_digest(rollout: Rollout) -> str:
    """A short text that is the same for the same prompt, on every machine."""
    prompt = rollout.prompt
    if isinstance(prompt, np.ndarray):
        content = b"ids" + prompt.astype("<i8").tobytes()
    elif isinstance(prompt, str):
        content = b"text" + prompt.encode()
    else:
        content = b"messages" + json.dumps(prompt, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


class Folds:
    """Assigns prompts to folds by their digests, without remembering them.

    The first prompts that come get a fold each, so that no fold is empty; those are remembered.

    Args:
        count: How many folds.
        first: The digests of the first prompts, from an earlier run.
    """

    def __init__(self, count: int, first: Iterable[str] = ()) -> None:
        self.count = count
        self._first = {digest: fold for fold, digest in enumerate(first)}

    @property
    def first(self) -> list[str]:
        """The digests of the first prompts, at most one for each fold."""
        return list(self._first)

    def fold(self, digest: str) -> int:
        """The fold of the prompt with this digest, from 0 on."""
        if digest not in self._first and len(self._first) < self.count:
            self._first[digest] = len(self._first)
        return self._first.get(digest, int(digest, 16) % self.count)
