"""How far an attack goes: a short form for every run of the tests, the long one for `VHEAD_ATTACK_SCALE=long`."""

import os


def scaled(short: int, long: int) -> int:
    """How many times an attack tries, in the form that the environment asks for."""
    scale = os.environ.get("VHEAD_ATTACK_SCALE") or "short"
    if scale not in {"short", "long"}:
        raise ValueError(f"VHEAD_ATTACK_SCALE: expected short or long, got {scale!r}")
    return short if scale == "short" else long
