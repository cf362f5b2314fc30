"""How much a request may bring, and how long it may take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may have.

    Attributes:
        body_bytes: Bytes of its body.
        bodies_bytes: Bytes of all bodies that are being received or read at one moment.
        rollouts: Rollouts, or inputs.
        tokens: Tokens of these, prompts included.
        body_s: Seconds for the header, and then the body, to arrive.
        answer_s: Seconds for the scores to be computed, the wait in the queue included.
    """

    body_bytes: int = 32 * 2**20
    bodies_bytes: int = 128 * 2**20
    rollouts: int = 4096
    tokens: int = 262_144
    body_s: float = 30.0
    answer_s: float = 600.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
