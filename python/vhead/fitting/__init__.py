"""Heads fitted to rollouts on a frozen language model: one pass of the model, and no gradients through it."""

from vhead.fitting.fitted import FittedHead
from vhead.fitting.functions import fit

__all__ = ["FittedHead", "fit"]
