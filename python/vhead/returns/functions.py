"""The public functions: they check what comes, choose where it is computed, and apply the frameworks' conventions."""

import sys
from typing import Any, Literal

import numpy as np

from vhead.returns.arguments import Rollouts, check_shape, finite, fraction, fractions, on_cpu, rollouts_of
from vhead.returns.places import Place, place_of

Convention = Literal["vhead", "verl", "nemo_rl", "slime", "trl"]
Kl = Literal["k1", "k2", "k3", "abs"]

_CONVENTIONS = ("vhead", "verl", "nemo_rl", "slime", "trl")
_KLS = ("k1", "k2", "k3", "abs")


def gae(
    rewards: Any,
    values: Any,
    *,
    mask: Any = None,
    offsets: Any = None,
    gamma: float = 1.0,
    lam: Any = 0.95,
    value_lam: Any = None,
    bootstrap: Any = None,
    convention: Convention = "vhead",
) -> tuple[Any, Any]:
    """Generalised advantage estimation over the tokens that the model wrote: advantages and returns.

    Tokens that it did not write are no steps: the next value and the running advantage of a token are those of the next
    model token, whatever lies between. Behind the last model token the value is `bootstrap` and the advantage 0.
    Gradients are not wanted, and not there.

    Args:
        rewards: `[T]` with offsets, `[B, T]`, or `[T]` for one rollout; any real dtype, read as float32.
        values: Likewise; the value of token t is the head's output at the position that predicts it.
        mask: Of the same shape, bool or the integers 0 and 1, True where the model wrote the token; None: everywhere.
            A rollout without model tokens gets zeros.
        offsets: int64 `[N + 1]`; rollout i owns the entries `offsets[i]:offsets[i + 1]`.
        gamma: Discount of one step, in [0, 1].
        lam: Lambda of the advantages, in [0, 1]: a number, or one for each rollout.
        value_lam: Lambda of the returns, likewise; None: `lam`.
        bootstrap: Value after the last token, one for each rollout, where a rollout was cut off; None: 0.
        convention: Whose numbers: `"vhead"` has 0 at masked places and whitens nothing; `"verl"`, `"nemo_rl"`,
            `"slime"` and `"trl"` give what these frameworks compute, masked places and whitening included.

    Returns:
        float32 advantages and returns in the shape of `rewards`, numpy or torch as that.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes that differ, offsets that do not fit, a number outside its range, or one that is read and not
            finite; the message names the rollout and the token.
    """
    if convention not in _CONVENTIONS:
        raise ValueError(f"convention: expected one of {', '.join(_CONVENTIONS)}, got {convention!r}")
    place = place_of(rewards=rewards, values=values, mask=mask, bootstrap=bootstrap)
    rewards, values = place.floats("rewards", rewards), place.floats("values", values)
    rollouts = rollouts_of("rewards", rewards.shape, offsets)
    check_shape("values", values.shape, rewards.shape, "rewards")
    mask = _mask(place, mask, rollouts, "rewards")
    rules = (
        fraction("gamma", gamma),
        fractions("lam", lam, rollouts.count),
        None if value_lam is None else fractions("value_lam", value_lam, rollouts.count),
        _per_rollout(place, "bootstrap", bootstrap, rollouts),
    )
    advantages, returns = _by_convention(convention, place.kernels, rewards, values, mask, rollouts.offsets, rules)
    return place.result(advantages), place.result(returns)


def length_adaptive_lam(lengths: Any, alpha: float = 0.05) -> Any:
    """Lambda for each rollout by its length: `1 - 1 / max(alpha * length, 1)`.

    Args:
        lengths: `[N]`, model tokens of each rollout.
        alpha: Above 0.

    Returns:
        float64 `[N]` in [0, 1], numpy or torch as `lengths`.

    Raises:
        TypeError: Lengths that are no numbers.
        ValueError: A length below 0 or not finite, or an alpha that is not above 0.
    """
    alpha = finite("alpha", alpha, positive=True)
    found = np.asarray(on_cpu(lengths))
    if found.dtype.kind not in "fiu":
        raise TypeError(f"lengths: expected numbers of tokens, got {found.dtype}")
    wrong = ~(np.isfinite(found) & (found >= 0))
    if wrong.any():
        raise ValueError(f"lengths: expected numbers of tokens, got {found[wrong].flat[0]}")
    lam = 1.0 - 1.0 / np.maximum(alpha * found.astype(np.float64), 1.0)
    torch = sys.modules.get("torch")
    return torch.as_tensor(lam).to(lengths.device) if torch and isinstance(lengths, torch.Tensor) else lam


def discounted(rewards: Any, *, gamma: float, mask: Any = None, offsets: Any = None, bootstrap: Any = None) -> Any:
    """Discounted sums of the rewards of each model token and those behind it; 0 at masked places.

    Args:
        rewards: As in `gae`.
        gamma: Discount of one step, in [0, 1].
        mask: As in `gae`; tokens that the model did not write are no steps.
        offsets: As in `gae`.
        bootstrap: As in `gae`.

    Returns:
        float32 in the shape of `rewards`, numpy or torch as that.

    Raises:
        TypeError: As `gae`.
        ValueError: As `gae`.
    """
    place = place_of(rewards=rewards, mask=mask, bootstrap=bootstrap)
    rewards = place.floats("rewards", rewards)
    rollouts = rollouts_of("rewards", rewards.shape, offsets)
    mask = _mask(place, mask, rollouts, "rewards")
    final = _per_rollout(place, "bootstrap", bootstrap, rollouts)
    return place.result(place.kernels.discounted(rewards, mask, rollouts.offsets, fraction("gamma", gamma), final))


def token_rewards(
    reward: Any,
    *,
    mask: Any = None,
    offsets: Any = None,
    logprobs: Any = None,
    ref_logprobs: Any = None,
    kl_coef: float = 0.0,
    kl: Kl = "k1",
) -> Any:
    """Rewards of tokens: the rollout's at its last model token, less a penalty at every model token; 0 elsewhere.

    With `d = logprobs - ref_logprobs`, the divergence is estimated as `d` (k1), `d**2 / 2` (k2), `exp(-d) - 1 + d` (k3)
    or `abs(d)`. A reward never lands on padding or on a token that the model did not write.

    Args:
        reward: `[N]`, one for each rollout.
        mask: As in `gae`. One of `mask`, `offsets` and `logprobs` says how many tokens there are.
        offsets: As in `gae`.
        logprobs: The policy's log-probability of each token.
        ref_logprobs: The reference's.
        kl_coef: What one nat costs.
        kl: How the divergence is estimated.

    Returns:
        float32, flat with offsets, else in the shape of `mask` or `logprobs`, numpy or torch as `reward`.

    Raises:
        TypeError: As `gae`.
        ValueError: As `gae`; a rollout has no model token, or log-probabilities are missing.
    """
    if kl not in _KLS:
        raise ValueError(f"kl: expected one of {', '.join(_KLS)}, got {kl!r}")
    if (logprobs is None) != (ref_logprobs is None):
        given, missing = ("logprobs", "ref_logprobs") if ref_logprobs is None else ("ref_logprobs", "logprobs")
        raise ValueError(f"{missing}: expected log-probabilities beside {given}, got None")
    kl_coef = finite("kl_coef", kl_coef)
    if kl_coef and logprobs is None:
        raise ValueError(f"logprobs: expected log-probabilities for kl_coef={kl_coef}, got None")
    place = place_of(reward=reward, mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    rollouts = _rollouts_of_any(mask, logprobs, offsets)
    pair = None
    if logprobs is not None:
        pair = (place.floats("logprobs", logprobs), place.floats("ref_logprobs", ref_logprobs))
        for name, array in zip(("logprobs", "ref_logprobs"), pair, strict=True):
            check_shape(name, array.shape, rollouts.shape, "the tokens")
    mask, found = _mask(place, mask, rollouts, "the tokens"), _per_rollout(place, "reward", reward, rollouts)
    return place.result(place.kernels.token_rewards(found, mask, rollouts.offsets, pair, kl_coef, kl, rollouts.shape))


def whiten(x: Any, *, mask: Any = None, shift_mean: bool = True) -> Any:
    """Numbers with mean 0 and variance 1 over all model tokens; 0 at masked places, which do not count.

    The variance is unbiased, and 1e-8 is added to it.

    Args:
        x: Any shape; any real dtype, read as float32.
        mask: As in `gae`.
        shift_mean: False keeps the mean, and changes the variance only.

    Returns:
        float32 in the shape of `x`, numpy or torch as that.

    Raises:
        TypeError: As `gae`.
        ValueError: The mask has another shape, or fewer than two tokens are the model's.
    """
    place = place_of(x=x, mask=mask)
    x = place.floats("x", x)
    return place.result(place.kernels.whiten(x, _mask_like(place, mask, x, "x"), shift_mean=bool(shift_mean)))


def explained_variance(values: Any, returns: Any, *, mask: Any = None) -> float:
    """The share of the returns' variance that the values explain: `1 - var(returns - values) / var(returns)`.

    Both variances are over all model tokens of all rollouts at once. The mean of what micro-batches give is another
    number; give all of them together.

    Args:
        values: Any shape.
        returns: The same shape.
        mask: As in `gae`.

    Returns:
        At most 1; NaN where the returns do not vary.

    Raises:
        TypeError: As `gae`.
        ValueError: Shapes differ.
    """
    place = place_of(values=values, returns=returns, mask=mask)
    values, returns = place.floats("values", values), place.floats("returns", returns)
    check_shape("returns", returns.shape, values.shape, "values")
    return float(place.kernels.explained_variance(values, returns, _mask_like(place, mask, values, "values")))


def _by_convention(
    convention: str, kernels: Any, rewards: Any, values: Any, mask: Any, offsets: Any, rules: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Advantages and returns as a framework computes them."""
    if convention == "slime":
        # It knows no mask: every token is a step.
        advantages, returns = kernels.gae(rewards, values, None, offsets, *rules, carry=False)
        return advantages, returns
    if convention == "trl":
        # It knows padding only. The place after the last token counts: its value is read, and the reward stands there.
        counted = None if mask is None else kernels.up_to_the_place_after_the_last(mask, offsets)
        advantages, returns = kernels.gae(rewards, values, counted, offsets, *rules, carry=False)
        return kernels.whiten(advantages, mask), returns
    advantages, returns = kernels.gae(rewards, values, mask, offsets, *rules, carry=convention != "vhead")
    if convention == "verl":
        advantages = kernels.whiten(advantages, mask, everywhere=True)
    elif convention == "nemo_rl":
        advantages = kernels.whiten(advantages, mask, unbiased=False)
    return advantages, returns


def _mask(place: Place, mask: Any, rollouts: Rollouts, like: str) -> Any:
    found = place.mask(mask)
    if found is not None:
        check_shape("mask", found.shape, rollouts.shape, like)
    return found


def _mask_like(place: Place, mask: Any, x: Any, like: str) -> Any:
    found = place.mask(mask)
    if found is not None:
        check_shape("mask", found.shape, x.shape, like)
    return found


def _per_rollout(place: Place, name: str, numbers: Any, rollouts: Rollouts) -> Any:
    if numbers is None:
        return None
    found = place.floats(name, numbers)
    check_shape(name, found.shape, (rollouts.count,), "one for each rollout")
    return found


def _rollouts_of_any(mask: Any, logprobs: Any, offsets: Any) -> Rollouts:
    """How tokens lie, by whichever argument says it."""
    for name, array in (("mask", mask), ("logprobs", logprobs)):
        if array is not None:
            return rollouts_of(name, np.shape(array), offsets)
    if offsets is None:
        raise ValueError("offsets: expected offsets, a mask or log-probabilities, which say how many tokens there are")
    found = np.asarray(on_cpu(offsets))
    return rollouts_of("the rollouts", (int(found[-1]) if found.ndim == 1 and len(found) else 0,), found)
