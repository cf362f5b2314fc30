"""What is scored: rollouts, how they become token ids, and the files and records that they come from."""

from vhead.rollouts.records import from_records
from vhead.rollouts.rollout import Rollout

__all__ = ["Rollout", "from_records"]
