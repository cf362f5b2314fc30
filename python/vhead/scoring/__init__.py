"""Scoring rollouts: per-token values, log-probabilities and entropies, and one reward each."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhead.packing.plan import ScorerPlan
    from vhead.rollouts.rollout import Rollout
    from vhead.scoring.conventions import Conventions
    from vhead.scoring.scorer import Scorer
    from vhead.scoring.scores import Score, Scores

__all__ = ["Conventions", "Rollout", "Score", "Scorer", "ScorerPlan", "Scores"]

_HOME = {
    "Conventions": "scoring.conventions",
    "Rollout": "rollouts",
    "Score": "scoring.scores",
    "Scorer": "scoring.scorer",
    "ScorerPlan": "packing.plan",
    "Scores": "scoring.scores",
}


def __getattr__(name: str) -> object:
    """Imports on first use, as only `Scorer` needs torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'vhead.scoring' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vhead.{_HOME[name]}"), name)
