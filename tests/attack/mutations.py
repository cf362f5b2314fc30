"""Files as somebody might have damaged or forged them: bytes, numbers and names changed by a seed."""

import copy
import json
import random
from pathlib import Path

NUMBERS = (-1, 0, 1, 7, 2**31, 2**63, 10**18, 10**40, -(10**18), 0.5, 1e308, float("nan"), float("inf"))
TEXTS = ("", "x", "float99", "../../etc/passwd", "\x1b[2J", "\ud800", "a" * 5000)
HOSTILE = (*NUMBERS, *TEXTS, None, True, [], [[]], {}, {"a": 1}, [None], ["x"], [1, 2, 3])

_LONGEST = 64


def mutated(content: bytes, random_: random.Random) -> bytes:
    """Content with one kind of damage, or several."""
    result = bytearray(content)
    for _ in range(random_.choice((1, 1, 1, 3))):
        random_.choice((_flip, _cut, _insert, _repeat, _blank))(result, random_)
    return bytes(result)


def _place(result: bytearray, random_: random.Random) -> int:
    # What is told about a file stands at its two ends.
    size = len(result)
    return min(
        random_.choice((random_.randrange(64), random_.randrange(size + 1), size - random_.randrange(64))), size
    ) % (size + 1)


def _flip(result: bytearray, random_: random.Random) -> None:
    for _ in range(random_.choice((1, 1, 4, 32))):
        if result:
            result[_place(result, random_) % len(result)] = random_.randrange(256)


def _cut(result: bytearray, random_: random.Random) -> None:
    del result[_place(result, random_) :]


def _insert(result: bytearray, random_: random.Random) -> None:
    place = _place(result, random_)
    result[place:place] = random_.randbytes(random_.randrange(1, _LONGEST))


def _repeat(result: bytearray, random_: random.Random) -> None:
    start, place = _place(result, random_), _place(result, random_)
    result[place:place] = result[start : start + random_.randrange(1, _LONGEST)]


def _blank(result: bytearray, random_: random.Random) -> None:
    start = _place(result, random_)
    result[start : start + _LONGEST] = bytes(len(result[start : start + _LONGEST]))


def mutated_json(content: bytes, random_: random.Random) -> bytes:
    """A JSON text with values, keys or parts that nobody expects in their places; damaged, where it is no JSON."""
    try:
        document = json.loads(content)
    except ValueError:
        return mutated(content, random_)
    for _ in range(random_.choice((1, 1, 1, 2, 5))):
        _change(document, random_)
    return json.dumps(document).encode()


def _change(document: object, random_: random.Random) -> None:
    places: list[tuple[object, object]] = []
    waiting = [document]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict | list) and part:
            entries = list(part.items() if isinstance(part, dict) else enumerate(part))
            places += [(part, key) for key, _ in entries]
            waiting += [value for _, value in entries]
    if not places:
        return
    part, key = random_.choice(places)
    match random_.randrange(5):
        case 0:
            del part[key]
        case 1 if isinstance(part, dict):
            part[random_.choice(("x", "", "v_head.weight", "__metadata__", str(key) * 3))] = part.pop(key)
        case _:
            part[key] = copy.deepcopy(random_.choice(HOSTILE))


def mutated_safetensors(content: bytes, random_: random.Random) -> bytes:
    """A safetensors file whose header says something else, or whose bytes are damaged."""
    size = int.from_bytes(content[:8], "little")
    if random_.random() < 0.5:
        return mutated(content, random_)
    header = mutated_json(content[8 : 8 + size], random_)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def mutate_file(path: Path, random_: random.Random) -> None:
    """Changes one file in its place, as its kind is changed best."""
    change = {".json": mutated_json, ".safetensors": mutated_safetensors}.get(path.suffix, mutated)
    path.write_bytes(change(path.read_bytes(), random_))
