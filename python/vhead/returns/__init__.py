"""Advantages and returns of rollouts whose tokens are only partly the model's.

    rewards = token_rewards(reward, offsets=scores.offsets, mask=mask)
    advantages, returns = gae(rewards, scores.values, offsets=scores.offsets, mask=mask, lam=0.95, value_lam=1.0)

Arrays are flat with `offsets`, int64 `[N + 1]`, where rollout i owns the entries `offsets[i]:offsets[i + 1]`; or
padded, `[B, T]`, with a `mask`; or one rollout, `[T]`. The mask is True where the model wrote the token. numpy arrays
give numpy arrays, without importing torch; torch tensors give tensors on their device, without gradients. Everything
is computed in float64 and rounded to float32 once.
"""

from vhead.returns.functions import discounted as discounted
from vhead.returns.functions import explained_variance as explained_variance
from vhead.returns.functions import gae as gae
from vhead.returns.functions import length_adaptive_lam as length_adaptive_lam
from vhead.returns.functions import token_rewards as token_rewards
from vhead.returns.functions import whiten as whiten

__all__ = ["discounted", "explained_variance", "gae", "length_adaptive_lam", "token_rewards", "whiten"]
