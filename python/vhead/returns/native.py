"""The kernels on numpy arrays. `plain` has the same functions for tensors that are elsewhere."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead import _native
from vhead.env import read_settings

Floats = NDArray[np.float32]
Mask = NDArray[np.uint8]
Offsets = NDArray[np.int64]


def floats(name: str, array: Any) -> Floats:
    """float32 from any real dtype.

    Raises:
        TypeError: It holds something else.
    """
    found = np.asarray(array)
    # bfloat16 is no dtype of numpy's own, and says "V".
    if found.dtype.kind not in "fiub" and str(found.dtype) != "bfloat16":
        raise TypeError(f"{name}: expected floats, got {found.dtype}")
    return np.ascontiguousarray(found, np.float32)


def mask_of(array: Any) -> Mask:
    """1 where the model wrote the token.

    Raises:
        TypeError: It is neither bool nor an integer.
        ValueError: An integer is neither 0 nor 1.
    """
    found = np.asarray(array)
    if found.dtype.kind not in "biu":
        raise TypeError(f"mask: expected bool, or the integers 0 and 1, got {found.dtype}")
    if found.dtype.kind != "b":
        wrong = (found != 0) & (found != 1)
        if wrong.any():
            raise ValueError(f"mask: expected bool, or the integers 0 and 1, got {found[wrong].flat[0]}")
    return np.ascontiguousarray(found, np.bool_).view(np.uint8)


def gae(
    rewards: Floats,
    values: Floats,
    mask: Mask | None,
    offsets: Offsets,
    gamma: float,
    lam: list[float],
    value_lam: list[float] | None,
    bootstrap: Floats | None,
    *,
    carry: bool,
) -> tuple[Floats, Floats]:
    """Advantages and returns; masked places are 0, or carry what the next model token has."""
    # One block: where two are freed one after the other, the C library gives their pages back to the system, and
    # waiting for new pages would cost the next call more than all arithmetic.
    advantages, returns = np.empty((2, *rewards.shape), np.float32)
    arguments = (rewards, values, mask, offsets, gamma, lam, value_lam, bootstrap, carry, advantages, returns)
    _native.gae(*arguments, _threads())
    return advantages, returns


def discounted(rewards: Floats, mask: Mask | None, offsets: Offsets, gamma: float, bootstrap: Floats | None) -> Floats:
    """Returns of rewards alone: advantages over values of 0, with a lambda of 1."""
    returns, carry = np.empty_like(rewards), False
    _native.gae(rewards, None, mask, offsets, gamma, [1.0], None, bootstrap, carry, returns, None, _threads())
    return returns


def token_rewards(
    reward: Floats,
    mask: Mask | None,
    offsets: Offsets,
    logprobs: tuple[Floats, Floats] | None,
    kl_coef: float,
    kl: str,
    shape: tuple[int, ...],
) -> Floats:
    """The reward of each token."""
    rewards = np.empty(shape, np.float32)
    _native.token_rewards(reward, mask, offsets, logprobs, kl_coef, kl, rewards, _threads())
    return rewards


def whiten(
    x: Floats, mask: Mask | None, *, shift_mean: bool = True, unbiased: bool = True, everywhere: bool = False
) -> Floats:
    """Mean 0 and variance 1 over the mask; masked places are 0, or treated as the others where `everywhere`.

    Raises:
        ValueError: The mask holds fewer than two places.
    """
    whitened = np.empty_like(x)
    check_count(_native.whiten(x, mask, shift_mean, unbiased, everywhere, whitened, _threads()))
    return whitened


def explained_variance(values: Floats, returns: Floats, mask: Mask | None) -> float:
    """The share of the returns' variance that the values explain."""
    return _native.explained_variance(values, returns, mask, _threads())


def up_to_the_place_after_the_last(mask: Mask, offsets: Offsets) -> Mask:
    """1 in each rollout up to the place after the last model token, 0 behind it and where there is no model token."""
    counted = np.zeros(mask.size, np.uint8)
    flat = mask.reshape(-1)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        last = flat[start:stop].nonzero()[0][-1:]
        counted[start : min(stop, start + int(last[0]) + 2) if len(last) else start] = 1
    return counted.reshape(mask.shape)


def check_count(count: int) -> None:
    """Refuses what has no variance to divide by.

    Raises:
        ValueError: There are fewer than two places.
    """
    if count < 2:
        raise ValueError(f"mask: expected at least two tokens of the model to whiten, got {count}")


def _threads() -> int | None:
    return read_settings().num_threads
