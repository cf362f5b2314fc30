"""The value head as a model of transformers; importing this registers it with their auto classes.

The classes are defined in `vhead.modeling.pretrained`. Users import this module, also for the registration alone.
"""

from vhead.modeling.pretrained import ValueHeadConfig, ValueHeadModel, ValueHeadModelOutput

__all__ = ["ValueHeadConfig", "ValueHeadModel", "ValueHeadModelOutput"]
