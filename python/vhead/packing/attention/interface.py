"""How a model is made to attend along the paths of a packed row: through transformers' attention interface."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from vhead.packing.checkpointing import recomputed_within
from vhead.upstream import available

NAME = "vhead_tree"
# What some models add to attention scores, by the names of the interface's arguments.
_TERMS = ("s_aux", "position_bias")
_CONFIGURED = "_attn_implementation_internal"


class Attend(Protocol):
    """What attends over one packed row, for one layer after the other."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """Attends over the row in one layer.

        Args:
            query: `[1, heads, T, D]`.
            key: `[1, key heads, T, D]`, whose heads each serve the same number of query heads.
            value: `[1, key heads, T, E]`.
            scale: What the products are multiplied by; None: `D ** -0.5`.
            softcap: Gemma 2's bound of the scaled products, or None.
            window: Tokens that each token sees on its path, itself among them; None: all.

        Returns:
            `[1, T, heads, E]`, contiguous.
        """


class _Active(threading.local):
    """What the attention function works on in this thread."""

    attend: Attend | None = None


_active = _Active()


def attending() -> Attend | None:
    """What attends in this thread in place of the model's own attention; None: nothing does."""
    return _active.attend


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What the attention interface calls. Some arguments are ignored; whether they matter, the self-check finds out."""
    del module, attention_mask
    if dropout := others.get("dropout"):
        raise NotImplementedError(f"the model drops attention weights while it trains (a share of {dropout})")
    if needed := [name for name in _TERMS if others.get(name) is not None]:
        raise NotImplementedError(f"the model adds terms of its own to attention scores: {', '.join(needed)}")
    if _active.attend is None:
        raise RuntimeError(
            f"the attention {NAME!r} works only while a scorer or a training pass runs the model, in its own thread"
        )
    return _active.attend(query, key, value, scale=scaling, softcap=softcap, window=sliding_window), None


def register() -> None:
    """Makes the attention function known to transformers under its own name.

    Raises:
        NotImplementedError: This release of transformers has no attention interface.
    """
    if not available("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS"):
        raise NotImplementedError("this release of transformers has no attention interface")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # absent before 4.48

    # Before 4.50 it was a dict.
    add = getattr(ALL_ATTENTION_FUNCTIONS, "register", None) or ALL_ATTENTION_FUNCTIONS.__setitem__
    add(NAME, _forward)


class AttentionInterface:
    """Puts another attention in the place of a model's own.

    Args:
        model: Any model that goes through transformers' attention interface.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        found = (getattr(module, "config", None) for module in model.modules())
        self._configs: list[Any] = [*{id(config): config for config in found if hasattr(config, _CONFIGURED)}.values()]

    @contextmanager
    def attending(self, attend: Attend) -> Iterator[None]:
        """Lets the model's layers attend in this way while the block runs, in this thread.

        Layers that gradient checkpointing computes again, after the block and maybe in another thread, attend in this
        way then too.
        """
        register()
        with self._attending(attend), recomputed_within(self._model, partial(self._attending, attend)):
            yield

    def plain(self) -> AbstractContextManager[None]:
        """Lets the layers compute the model's own attention with plain products while the block runs."""
        return self._configured("eager")

    @contextmanager
    def _attending(self, attend: Attend) -> Iterator[None]:
        before = _active.attend
        try:
            _active.attend = attend
            with self._configured(NAME):
                yield
        finally:
            _active.attend = before

    @contextmanager
    def _configured(self, name: str) -> Iterator[None]:
        # The public setter would write into the configurations inside a configuration as well.
        before = [getattr(config, _CONFIGURED) for config in self._configs]
        try:
            for config in self._configs:
                setattr(config, _CONFIGURED, name)
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                setattr(config, _CONFIGURED, own)
