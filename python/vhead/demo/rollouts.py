"""The records of the bundled file."""

import json
from dataclasses import dataclass
from pathlib import Path

from vhead.demo import demo_rollouts_path

NATURAL = "natural"
TO_THE_END = "to the end"
IN_THE_MIDDLE = "in the middle"


@dataclass(frozen=True, slots=True)
class DemoRollout:
    """A passage of held-out text, or a corrupted twin of it.

    Attributes:
        id: Its name in the file.
        topic: The held-out topic of `pydoc_data.topics` that it was cut from.
        prompt: The beginning of the passage, never corrupted.
        completion: The rest of the passage.
        kind: `natural`, or how the completion was corrupted.
        extent: `natural`, `to the end` or `in the middle`: which part of the completion is corrupted.
        span: First and one-past-last character of the completion that the corruption changed.
        licence: The licence of the text.
    """

    id: str
    topic: str
    prompt: str
    completion: str
    kind: str
    extent: str
    span: tuple[int, int]
    licence: str


def read_demo_rollouts(path: Path | None = None) -> list[DemoRollout]:
    """The bundled rollouts, each passage followed by its corrupted twins."""
    lines = (path or demo_rollouts_path()).read_text(encoding="utf-8").splitlines()
    return [DemoRollout(**record | {"span": tuple(record["span"])}) for record in map(json.loads, lines)]
