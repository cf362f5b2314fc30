"""What the kernels compute, in torch's own operations where the tensors are: for devices that are not the CPU.

The recurrences `A[t] = b[t] + a[t] A[t + 1]` become scans by doubling: after k steps each place knows what 2^k places
behind it make of it, in as many operations on whole tensors as the number of tokens has bits. Factors of 0 at the last
place of each rollout keep rollouts apart, so that flat and padded tensors are one case.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vhead.returns.native import check_count

# Apple's devices have no float64.
_WITHOUT_FLOAT64 = frozenset({"mps"})


def floats(name: str, array: Tensor) -> Tensor:
    """float32 from any real dtype.

    Raises:
        TypeError: It holds something else.
    """
    if array.is_complex():
        raise TypeError(f"{name}: expected floats, got {str(array.dtype).removeprefix('torch.')}")
    return array.float()


def mask_of(array: Tensor) -> Tensor:
    """True where the model wrote the token.

    Raises:
        TypeError: It is neither bool nor an integer.
        ValueError: An integer is neither 0 nor 1.
    """
    if array.is_floating_point() or array.is_complex():
        dtype = str(array.dtype).removeprefix("torch.")
        raise TypeError(f"mask: expected bool, or the integers 0 and 1, got {dtype}")
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        raise ValueError(f"mask: expected bool, or the integers 0 and 1, got {array[wrong][0].item()}")
    return array.bool()


@dataclass(frozen=True)
class _Tokens:
    """Flat tensors about the tokens `[T]` of N rollouts."""

    model: Tensor
    rollout: Tensor
    starts: Tensor
    # The next model token's place behind each token, T and more where there is none in its rollout.
    following: Tensor

    @classmethod
    def of(cls, like: Tensor, mask: Tensor | None, offsets: Any) -> "_Tokens":
        bounds = torch.as_tensor(offsets, device=like.device)
        count, device = like.numel(), like.device
        model = torch.ones(count, dtype=torch.bool, device=device) if mask is None else mask.reshape(-1)
        rollout = torch.repeat_interleave(torch.arange(len(bounds) - 1, device=device), bounds.diff())
        places = torch.arange(count, device=device)
        own = torch.where(model, places, count)
        nearest = own.flip(0).cummin(0).values.flip(0) if count else own
        behind = torch.cat([nearest[1:], nearest.new_full((min(count, 1),), count)])
        stops = bounds[1:][rollout]
        return cls(model, rollout, bounds[:-1], torch.where(behind < stops, behind, count))

    @property
    def has_following(self) -> Tensor:
        return self.following < len(self.following)

    def per_rollout(self, numbers: Sequence[float]) -> Tensor:
        """One of the numbers for each token."""
        dtype = _exact(self.model)
        found = torch.tensor(numbers, dtype=dtype, device=self.model.device)
        return found.expand(len(self.rollout)) if len(found) == 1 else found[self.rollout]

    def check(self, name: str, numbers: Tensor, *, everywhere: bool = False) -> None:
        """Refuses numbers that are read and not finite.

        Raises:
            ValueError: There is one; the message names it.
        """
        wrong = ~numbers.reshape(-1).isfinite()
        if not everywhere:
            wrong &= self.model
        if wrong.any():
            token = int(wrong.int().argmax())
            rollout = int(self.rollout[token])
            position, number = token - int(self.starts[rollout]), numbers.reshape(-1)[token].item()
            got = f"{number} at token {position} of rollout {rollout}"
            raise ValueError(f"{name}: expected finite numbers, got {got}")


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    offsets: Any,
    gamma: float,
    lam: list[float],
    value_lam: list[float] | None,
    bootstrap: Tensor | None,
    *,
    carry: bool,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns; masked places are 0, or carry what the next model token has."""
    tokens = _Tokens.of(rewards, mask, offsets)
    tokens.check("rewards", rewards)
    tokens.check("values", values, everywhere=carry)
    exact = values.reshape(-1).to(_exact(values))
    deltas = _deltas(tokens, rewards.reshape(-1).to(exact.dtype), exact, gamma, bootstrap)
    advantages = _carried(tokens, deltas, gamma * tokens.per_rollout(lam))
    returns = advantages if value_lam is None else _carried(tokens, deltas, gamma * tokens.per_rollout(value_lam))
    returns = returns + exact
    if not carry:
        advantages, returns = advantages * tokens.model, torch.where(tokens.model, returns, 0.0)
    return advantages.float().reshape(rewards.shape), returns.float().reshape(rewards.shape)


def discounted(rewards: Tensor, mask: Tensor | None, offsets: Any, gamma: float, bootstrap: Tensor | None) -> Tensor:
    """Returns of rewards alone: advantages over values of 0, with a lambda of 1."""
    return gae(rewards, torch.zeros_like(rewards), mask, offsets, gamma, [1.0], None, bootstrap, carry=False)[0]


def token_rewards(
    reward: Tensor,
    mask: Tensor | None,
    offsets: Any,
    logprobs: tuple[Tensor, Tensor] | None,
    kl_coef: float,
    kl: str,
    shape: tuple[int, ...],
) -> Tensor:
    """The reward of each token."""
    empty = torch.zeros(shape, device=reward.device)
    tokens, exact = _Tokens.of(empty, mask, offsets), _exact(reward)
    last = tokens.model & ~tokens.has_following
    found = torch.zeros_like(reward, dtype=torch.int64).index_add_(0, tokens.rollout, last.long())
    if (found == 0).any():
        raise ValueError(
            "mask: expected a token of the model in every rollout that gets a reward, got none in rollout "
            f"{int((found == 0).int().argmax())}; leave it out"
        )
    rewards = torch.where(last, reward.to(exact)[tokens.rollout], 0.0)
    tokens.check("reward", torch.where(last, rewards, 0.0))
    if logprobs is not None:
        for name, numbers in zip(("logprobs", "ref_logprobs"), logprobs, strict=True):
            tokens.check(name, numbers)
        difference = (logprobs[0].to(exact) - logprobs[1].to(exact)).reshape(-1)
        rewards = rewards - torch.where(tokens.model, kl_coef * _kl(difference, kl), 0.0)
    return rewards.float().reshape(shape)


def whiten(
    x: Tensor, mask: Tensor | None, *, shift_mean: bool = True, unbiased: bool = True, everywhere: bool = False
) -> Tensor:
    """Mean 0 and variance 1 over the mask; masked places are 0, or treated as the others where `everywhere`.

    Raises:
        ValueError: The mask holds fewer than two places.
    """
    exact = x.to(_exact(x))
    kept = exact if mask is None else exact[mask]
    check_count(kept.numel())
    mean, variance = kept.mean(), kept.var(correction=int(unbiased))
    whitened = (exact - mean) / (variance + 1e-8).sqrt() + (0.0 if shift_mean else mean)
    return (whitened if everywhere or mask is None else torch.where(mask, whitened, 0.0)).float()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None) -> float:
    """The share of the returns' variance that the values explain."""
    exact = [x.to(_exact(x)) if mask is None else x[mask].to(_exact(x)) for x in (returns, returns.double() - values)]
    whole, left = (x.var(correction=0).item() for x in exact)
    return 1.0 - left / whole if whole else float("nan")


def up_to_the_place_after_the_last(mask: Tensor, offsets: Any) -> Tensor:
    """True in each rollout up to the place after the last model token, False behind it and where there is none."""
    tokens = _Tokens.of(mask, mask, offsets)
    counted = tokens.model | tokens.has_following
    after = counted.roll(1)
    after[tokens.starts[tokens.starts < len(after)]] = False
    return (counted | after).reshape(mask.shape)


def _exact(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type in _WITHOUT_FLOAT64 else torch.float64


def _deltas(tokens: _Tokens, rewards: Tensor, values: Tensor, gamma: float, bootstrap: Tensor | None) -> Tensor:
    """`reward + gamma value[next] - value` of each model token."""
    final = torch.zeros((), dtype=values.dtype, device=values.device)
    if bootstrap is not None:
        wrong = ~bootstrap.isfinite()
        if wrong.any():
            rollout = int(wrong.int().argmax())
            got = f"{bootstrap[rollout].item()} at token 0 of rollout {rollout}"
            raise ValueError(f"bootstrap: expected finite numbers, got {got}")
        final = bootstrap.to(values.dtype)[tokens.rollout]
    padded = torch.cat([values, values.new_zeros(1)])
    return rewards + gamma * torch.where(tokens.has_following, padded[tokens.following], final) - values


def _carried(tokens: _Tokens, deltas: Tensor, weights: Tensor) -> Tensor:
    """`A[t] = deltas[t] + weights[t] A[t + 1]` at the model's tokens, and `A[t + 1]` at the others."""
    totals = torch.where(tokens.model, deltas, 0.0)
    factors = torch.where(tokens.model, weights, 1.0)
    # The last place of a rollout hears of nothing.
    factors = torch.where(
        torch.cat([tokens.rollout.diff() == 0, factors.new_zeros(min(len(factors), 1)).bool()]), factors, 0.0
    )
    shift = 1
    while shift < len(totals):
        nothing = totals.new_zeros(shift)
        totals = totals + factors * torch.cat([totals[shift:], nothing])
        factors = factors * torch.cat([factors[shift:], nothing])
        shift *= 2
    return totals


def _kl(difference: Tensor, kl: str) -> Tensor:
    return {
        "k1": lambda: difference,
        "k2": lambda: 0.5 * difference.square(),
        "k3": lambda: torch.expm1(-difference) + difference,
        "abs": difference.abs,
    }[kl]()
