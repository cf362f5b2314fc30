"""The demo model's only text: `pydoc_data.topics`, the reference documentation that CPython ships (PSF licence).

Whole topics are held out, chosen by the hash of their names. The topics quote one another, so a paragraph of a
training topic that shares a run of `SHARED_RUN` characters with a held-out topic is dropped from training.
"""

import hashlib
import pydoc_data.topics
import re
from dataclasses import dataclass

CORPUS_NAME = "pydoc_data.topics"
CORPUS_LICENCE = "PSF-2.0"
# CPython 3.11.7. Other releases of CPython ship other texts, so the weights would differ.
CORPUS_SHA256 = "c6178f23b9e0b406d34502cda6e9b0c122613b8d4d5f5e0aa126def679d20bb6"
HELD_OUT_ONE_IN = 10
SHARED_RUN = 48


@dataclass(frozen=True)
class Corpus:
    """Training paragraphs and held-out topics, and the hash of the text that they came from."""

    sha256: str
    byte_count: int
    training: tuple[str, ...]
    held_out: dict[str, str]


def corpus_text(topics: dict[str, str]) -> str:
    """Joins all topics, each under its name, in the order of their names."""
    return "\n\n".join(f"{name}\n{body}" for name, body in sorted(topics.items()))


def is_held_out(name: str) -> bool:
    """Says whether a topic is held out: one in ten, by the SHA-256 of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def flatten(text: str) -> str:
    """Puts a paragraph on one line, with single spaces."""
    return " ".join(text.split())


def paragraphs(text: str) -> list[str]:
    """Splits at blank lines."""
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _runs(text: str) -> set[str]:
    return {text[i : i + SHARED_RUN] for i in range(len(text) - SHARED_RUN + 1)}


def _training_paragraphs(topics: dict[str, str], held_out: dict[str, str]) -> tuple[str, ...]:
    forbidden = set().union(
        *(_runs(flatten(paragraph)) for body in held_out.values() for paragraph in paragraphs(body))
    )
    kept: dict[str, str] = {}
    for name, body in sorted(topics.items()):
        for paragraph in [] if name in held_out else paragraphs(body):
            flat = flatten(paragraph)
            if forbidden.isdisjoint(_runs(flat)):
                kept.setdefault(flat, paragraph)
    return tuple(kept.values())


def load_corpus(*, accept_other: bool = False) -> Corpus:
    """Reads the corpus of the running interpreter.

    Raises:
        SystemExit: The text is not the one with `CORPUS_SHA256` and `accept_other` is false.
    """
    topics = pydoc_data.topics.topics
    text = corpus_text(topics).encode()
    digest = hashlib.sha256(text).hexdigest()
    if digest != CORPUS_SHA256 and not accept_other:
        raise SystemExit(
            f"{CORPUS_NAME} of this interpreter has SHA-256 {digest}, expected {CORPUS_SHA256} (CPython 3.11.7); "
            "pass --accept-other-corpus to train on it all the same"
        )
    held_out = {name: body for name, body in sorted(topics.items()) if is_held_out(name)}
    return Corpus(digest, len(text), _training_paragraphs(topics, held_out), held_out)


def is_prose(paragraph: str) -> bool:
    """Says whether a paragraph is running text: no listing, table, grammar rule or heading."""
    letters = sum(character.isalpha() or character == " " for character in flatten(paragraph))
    return (
        len(paragraph) > 60
        and letters > 0.88 * len(flatten(paragraph))
        and not re.search(r"::=|>>>|\*\*\*\*|====|----|\.\.\.\.", paragraph)
        and paragraph.strip()[0].isupper()
    )


def word_start(text: str, position: int) -> int:
    """The first position after `position` where a word starts, or the end."""
    return text.find(" ", position) + 1 or len(text)


def word_end(text: str, position: int) -> int:
    """The first position from `position` on where a word ends."""
    space = text.find(" ", position)
    return space if space >= 0 else len(text)
