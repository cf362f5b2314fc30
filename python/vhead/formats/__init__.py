"""How the value heads of different frameworks lie on disk.

A format knows which tensors are its head; where bytes come from is `vhead.checkpoint`'s business. A new format is one
more entry of `FORMATS`, and a module of this package that says how to find its tensors.
"""

from vhead.formats.registry import FORMATS, Format, find_head, save_beside_adapter
from vhead.formats.trl import BIAS_KEY, WEIGHT_KEY
from vhead.formats.weights import Detection, HeadWeights, LinearWeights

__all__ = [
    "BIAS_KEY",
    "FORMATS",
    "WEIGHT_KEY",
    "Detection",
    "Format",
    "HeadWeights",
    "LinearWeights",
    "find_head",
    "save_beside_adapter",
]
