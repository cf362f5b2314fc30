"""The bundled model and the bundled rollouts: enough to score real text without a network.

The model is a byte-level Llama with a trained value head, made by `tools/train_demo_model.py`; its folder holds a model
card and the provenance of the weights. Model and rollouts come from the documentation of CPython (PSF licence).
"""

from pathlib import Path

__all__ = ["demo_model_path", "demo_rollouts_path"]

_HERE = Path(__file__).parent


def demo_model_path() -> Path:
    """The folder of the bundled model, as `save_pretrained` writes it."""
    return _HERE / "model"


def demo_rollouts_path() -> Path:
    """The bundled rollouts, JSON Lines; `vhead.demo.rollouts.DemoRollout` describes the fields."""
    return _HERE / "rollouts.jsonl"
