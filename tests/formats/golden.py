"""The golden checkpoints and what must be read from them."""

import json
from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
WITH_BODY = [name for name, what in EXPECTED.items() if what["values"] is not None]
TOKENS = torch.tensor([[1, 5, 2, 9, 4, 7]])


def location(name):
    """The golden folder, or the file in it that must be named."""
    return GOLDEN / name / EXPECTED[name].get("file", "")


def layers(name):
    """The projections of a golden head: weight and bias, None where there is none."""
    for layer in EXPECTED[name]["layers"]:
        yield torch.tensor(layer["weight"]), None if layer["bias"] is None else torch.tensor(layer["bias"])
