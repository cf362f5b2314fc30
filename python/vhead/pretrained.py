"""The value head as a model of transformers; importing this registers it with their auto classes.

It is one of the rooms of `vhead.modeling`, and a module of its own here, since its import is what a user asks for.
"""

from vhead.modeling.pretrained import ValueHeadConfig, ValueHeadModel, ValueHeadModelOutput

__all__ = ["ValueHeadConfig", "ValueHeadModel", "ValueHeadModelOutput"]
