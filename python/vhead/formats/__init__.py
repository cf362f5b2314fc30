"""How the value heads of different frameworks lie on disk.

    head = formats.load("critic")                                  # whatever trained it
    formats.save(head, "value_head.safetensors", format="llama-factory")

A format knows which tensors are its head; where bytes come from is `vhead.checkpoint`'s business. A new format is one
more entry of `FORMATS`, and a module of this package that says how to find its tensors.
"""

from vhead.formats.layout import Format
from vhead.formats.registry import FORMATS, detect, find_head, load
from vhead.formats.trl import BIAS_KEY, WEIGHT_KEY
from vhead.formats.weights import Detection, HeadWeights, LinearWeights
from vhead.formats.writing import save, save_beside_adapter

__all__ = [
    "BIAS_KEY",
    "FORMATS",
    "WEIGHT_KEY",
    "Detection",
    "Format",
    "HeadWeights",
    "LinearWeights",
    "detect",
    "find_head",
    "load",
    "save",
    "save_beside_adapter",
]
