"""What is scored: rollouts, how they become token ids, and the files that they come from."""

from vhead.rollouts.rollout import Rollout

__all__ = ["Rollout"]
