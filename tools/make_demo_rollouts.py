"""Writes the rollouts that vhead ships: one passage of each held-out topic, and two corrupted twins of it.

    python tools/make_demo_rollouts.py

Nothing is picked by hand or by score: a topic gives its first paragraph of running text that is long enough, the kinds
of corruption are dealt out in order, and of the seeded draws the first is taken that changes most of its span.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
from demo_corpus import CORPUS_LICENCE, flatten, is_prose, load_corpus, paragraphs, word_end, word_start
from demo_corruption import CORRUPTIONS, Passage, corrupted_passage

from vhead.demo import demo_rollouts_path
from vhead.demo.rollouts import IN_THE_MIDDLE, NATURAL, TO_THE_END, DemoRollout

SEED = 2
PROMPT_CHARACTERS = 55
COMPLETION_CHARACTERS = 120
TURN_TO_THE_END = 0.4
TURNS_IN_THE_MIDDLE = (0.25, 0.6)
CHANGED_SHARE = 0.75
LAST_WORD = 12
RUN_TOGETHER = re.compile(r"[a-z]\.[A-Z]")  # a note that the corpus joins to the sentence before it


def passage(body: str) -> tuple[str, str] | None:
    """Prompt and completion from the first paragraph of running text that is long enough."""
    for paragraph in paragraphs(body):
        text = flatten(paragraph)
        long_enough = len(text) >= PROMPT_CHARACTERS + COMPLETION_CHARACTERS
        if is_prose(paragraph) and long_enough and not RUN_TOGETHER.search(text):
            turn = word_start(text, PROMPT_CHARACTERS - 8)
            return text[:turn], text[turn : word_end(text, turn + COMPLETION_CHARACTERS - 8)]
    return None


def twin(natural: DemoRollout, kind: str, extent: str, share: tuple[float, float]) -> DemoRollout:
    """The passage with a share of its completion corrupted."""
    text = natural.completion
    start = word_start(text, int(share[0] * len(text)))
    stop = word_end(text, int(share[1] * len(text)))
    draws = (corrupted_passage(text, start, stop, kind, np.random.default_rng([SEED, i])) for i in itertools.count())
    spoiled = next(draw for draw in draws if changes_most(draw, start, stop, extent))
    fields = asdict(natural) | {
        "id": f"{natural.topic}/{kind.replace(' ', '-')}-{extent.replace(' ', '-')}",
        "completion": spoiled.data.decode(),
        "kind": kind,
        "extent": extent,
        "span": changed_characters(spoiled),
    }
    return DemoRollout(**fields)


def changes_most(passage: Passage, start: int, stop: int, extent: str) -> bool:
    """Whether a draw changed most of its span, and the last word if it should reach the end."""
    reaches_end = extent != TO_THE_END or not all(passage.natural[-LAST_WORD:])
    return reaches_end and passage.natural.count(False) >= CHANGED_SHARE * (stop - start)


def changed_characters(passage: Passage) -> tuple[int, int]:
    """The corrupted span of a passage, counted in characters."""
    first = passage.natural.index(False)
    count = passage.natural.count(False)
    return len(passage.data[:first].decode()), len(passage.data[: first + count].decode())


def rollouts(held_out: dict[str, str]) -> Iterator[DemoRollout]:
    """Each passage and its twins, in the order of the topics."""
    passages = {topic: found for topic, body in held_out.items() if (found := passage(body))}
    for (topic, (prompt, completion)), kind in zip(passages.items(), CORRUPTIONS, strict=False):
        natural = DemoRollout(f"{topic}/natural", topic, prompt, completion, NATURAL, NATURAL, (0, 0), CORPUS_LICENCE)
        yield natural
        yield twin(natural, kind, TO_THE_END, (TURN_TO_THE_END, 1.0))
        yield twin(natural, kind, IN_THE_MIDDLE, TURNS_IN_THE_MIDDLE)


def main() -> None:
    """Writes the file beside and renames it."""
    lines = [json.dumps(asdict(rollout), ensure_ascii=False) for rollout in rollouts(load_corpus().held_out)]
    target = demo_rollouts_path()
    beside = target.with_suffix(".partial")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(target)


if __name__ == "__main__":
    main()
