"""Seeded ways of spoiling a passage of text, for training and testing the demo model's value head.

Every corruption maps a string to a string and draws from the generator it is given, so that a seed names a text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Corruption = Callable[[str, np.random.Generator], str]

KEYBOARD_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _keyboard_neighbours() -> dict[str, str]:
    neighbours = {}
    for row_index, row in enumerate(KEYBOARD_ROWS):
        for column, key in enumerate(row):
            near = row[max(0, column - 1) : column] + row[column + 1 : column + 2]
            for other in (
                KEYBOARD_ROWS[max(0, row_index - 1) : row_index] + KEYBOARD_ROWS[row_index + 1 : row_index + 2]
            ):
                near += other[max(0, column - 1) : column + 1]
            neighbours[key] = near
    return neighbours


NEIGHBOURS = _keyboard_neighbours()


def _choice(options: str, rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _permuted(items: list[str], rng: np.random.Generator) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))]


def _per_word(change: Callable[[str], str], text: str) -> str:
    return " ".join(change(word) for word in text.split(" "))


def _per_letter(change: Callable[[str], str], text: str, rate: float, rng: np.random.Generator) -> str:
    draws = rng.random(len(text))
    return "".join(
        change(letter) if letter.isalpha() and draw < rate else letter for letter, draw in zip(text, draws, strict=True)
    )


def _like(original: str, replacement: str) -> str:
    return replacement.upper() if original.isupper() else replacement


def shuffled_letters(text: str, rng: np.random.Generator) -> str:
    """Permutes the characters inside each word."""
    return _per_word(lambda word: "".join(_permuted(list(word), rng)), text)


def shuffled_words(text: str, rng: np.random.Generator) -> str:
    """Permutes the words."""
    return " ".join(_permuted(text.split(" "), rng))


def random_letters(text: str, rng: np.random.Generator) -> str:
    """Replaces every letter by a uniformly drawn one; spaces and punctuation stay."""
    return _per_letter(lambda letter: _like(letter, _choice(LETTERS, rng)), text, 1.0, rng)


def keyboard_noise(text: str, rng: np.random.Generator) -> str:
    """Hits a neighbouring key of a QWERTY keyboard for three letters in ten."""
    return _per_letter(
        lambda letter: _like(letter, _choice(NEIGHBOURS.get(letter.lower(), letter), rng)), text, 0.3, rng
    )


def dropped_letters(text: str, rng: np.random.Generator) -> str:
    """Deletes three letters in ten."""
    return _per_letter(lambda _: "", text, 0.3, rng)


def doubled_letters(text: str, rng: np.random.Generator) -> str:
    """Writes three letters in ten twice."""
    return _per_letter(lambda letter: letter + letter, text, 0.3, rng)


def swapped_neighbours(text: str, rng: np.random.Generator) -> str:
    """Exchanges four in ten of the pairs of neighbouring characters."""
    characters = list(text)
    position = 0
    while position + 1 < len(characters):
        if rng.random() < 0.4:
            characters[position : position + 2] = characters[position + 1], characters[position]
            position += 1
        position += 1
    return "".join(characters)


def repeated_words(text: str, rng: np.random.Generator) -> str:
    """Says four words in ten twice or three times."""
    return _per_word(lambda word: " ".join([word] * (1 + int(rng.integers(1, 3)) * int(rng.random() < 0.4))), text)


def reversed_words(text: str, _: np.random.Generator) -> str:
    """Spells each word backwards."""
    return _per_word(lambda word: word[::-1], text)


TRAINED: dict[str, Corruption] = {
    "shuffled letters": shuffled_letters,
    "shuffled words": shuffled_words,
    "random letters": random_letters,
    "keyboard noise": keyboard_noise,
    "dropped letters": dropped_letters,
    "doubled letters": doubled_letters,
    "swapped neighbours": swapped_neighbours,
    "repeated words": repeated_words,
}
# Kept out of training, to see whether the head learned what text looks like or only the list above.
UNSEEN: dict[str, Corruption] = {"reversed words": reversed_words}
CORRUPTIONS = TRAINED | UNSEEN


@dataclass(frozen=True)
class Passage:
    """A text as UTF-8 bytes with one label per byte: True where it is natural."""

    data: bytes
    natural: tuple[bool, ...]


def natural_passage(text: str) -> Passage:
    """Labels a whole text natural."""
    data = text.encode()
    return Passage(data, (True,) * len(data))


def corrupt_span(text: str, start: int, stop: int, kind: str, rng: np.random.Generator) -> str:
    """Returns the corrupted form of `text[start:stop]`."""
    return CORRUPTIONS[kind](text[start:stop], rng)


def _common_prefix(left: str, right: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def corrupted_passage(text: str, start: int, stop: int, kind: str, rng: np.random.Generator) -> Passage:
    """Corrupts `text[start:stop]` (characters) and labels the bytes.

    The label turns at the first and the last character that differ: what the corruption left alone at the
    edges of the span cannot be told from natural text by anybody.
    """
    original = text[start:stop]
    spoiled = corrupt_span(text, start, stop, kind, rng)
    head = _common_prefix(original, spoiled)
    tail = _common_prefix(original[head:][::-1], spoiled[head:][::-1])
    middle = spoiled[head : len(spoiled) - tail].encode()
    before = (text[:start] + spoiled[:head]).encode()
    after = (spoiled[len(spoiled) - tail :] + text[stop:]).encode()
    natural = (True,) * len(before) + (False,) * len(middle) + (True,) * len(after)
    return Passage(before + middle + after, natural)
