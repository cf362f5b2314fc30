"""How the value heads of different frameworks lie on disk.

    head = formats.load("critic")                                  # whatever trained it
    formats.save(head, "value_head.safetensors", format="llama-factory")
    formats.convert("critic", "critic-for-trl", format="trl")      # with its language model

A format knows which tensors are its head; where their bytes come from is the business of `vhead.checkpoints`. A new
format is one more entry of `FORMATS`, and a module of this package that says how to find its tensors.
"""

from vhead.formats.conversion import Conversion, convert
from vhead.formats.layout import Detection, Format
from vhead.formats.megatron import VERL_MEGATRON as _VERL_MEGATRON
from vhead.formats.registry import FORMATS, detect, find_head, load
from vhead.formats.trl import BIAS_KEY, WEIGHT_KEY
from vhead.formats.writing import save, save_beside_adapter
from vhead.head_weights import HeadWeights, LinearWeights

# The format whose head lies where transformers expects a language model's output layer.
VERL_MEGATRON = _VERL_MEGATRON.name

__all__ = [
    "BIAS_KEY",
    "FORMATS",
    "VERL_MEGATRON",
    "WEIGHT_KEY",
    "Conversion",
    "Detection",
    "Format",
    "HeadWeights",
    "LinearWeights",
    "convert",
    "detect",
    "find_head",
    "load",
    "save",
    "save_beside_adapter",
]
