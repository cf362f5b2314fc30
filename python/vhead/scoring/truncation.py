"""What becomes of a rollout that is longer than it may be."""

from dataclasses import dataclass
from typing import Literal, Self, get_args

from vhead.errors import FieldError, VheadError

Truncation = Literal["prompt", "completion"]


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """How many tokens a rollout may have, and which are cut off where it has more.

    Attributes:
        tokens: Of prompt and completion together; None: any number.
        truncation: `"prompt"` cuts the prompt's first tokens off, `"completion"` the completion's last ones, None none.
        is_context: Whether the limit is the model's own.
    """

    tokens: int | None
    truncation: Truncation | None = None
    is_context: bool = True

    @classmethod
    def of(cls, context_length: int | None, max_length: int | None, truncation: Truncation | None) -> Self:
        """The limit of a model that is asked to keep to `max_length`.

        Raises:
            ValueError: `truncation` is none of these, or `max_length` leaves no room for a prompt and a completion.
            VheadError: `max_length` is more than the model takes.
        """
        if truncation is not None and truncation not in get_args(Truncation):
            raise ValueError(f"truncation: expected None, {' or '.join(get_args(Truncation))}, got {truncation!r}")
        if max_length is None:
            return cls(context_length, truncation)
        if max_length < 2:
            raise ValueError(f"max_length: expected at least 2, a prompt's token and a completion's, got {max_length}")
        if context_length is not None and max_length > context_length:
            raise VheadError(f"max_length: expected at most the model's {context_length} tokens, got {max_length}")
        return cls(max_length, truncation, is_context=False)

    def kept(self, prompt: int, completion: int, name: str) -> tuple[int, int]:
        """The first token and the one past the last of so many that stay, at least one of each part among them.

        Raises:
            FieldError: Both are too long together and nothing may be cut off, or the part that has to stay whole is too
                long by itself.
        """
        length = prompt + completion
        excess = 0 if self.tokens is None else length - self.tokens
        if excess <= 0:
            return 0, length
        if self.truncation == "prompt" and excess < prompt:
            return excess, length
        if self.truncation == "completion" and excess < completion:
            return 0, length - excess
        raise self._error(prompt, completion, name)

    def _error(self, prompt: int, completion: int, name: str) -> FieldError:
        if self.truncation is None:
            limit = f"the model's {self.tokens}" if self.is_context else f"{self.tokens}"
            expected = f"at most {limit} tokens together with the prompt"
            got = f"{prompt} + {completion} = {prompt + completion}"
            return FieldError(name, "completion", expected=expected, got=got)
        kept, cut, length = "completion", "prompt", completion
        if self.truncation == "completion":
            kept, cut, length = cut, kept, prompt
        # Only a limit that there is can be exceeded.
        room = (self.tokens or 0) - 1
        expected = f"at most {room} tokens, as the {cut} alone is truncated and keeps at least one"
        return FieldError(name, kept, expected=expected, got=str(length))
