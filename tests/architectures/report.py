"""One row of the table of model types: what holds for one model type, found by running it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers

from tests.architectures.checks import ASPECTS, HOLDS, Subject, applies, subject
from tests.architectures.limits import LIMITS, left_out
from vhead.backbone.hidden_states import Retention, Route

KNOWN_LIMIT = "no"
DOES_NOT_APPLY = "n/a"
# What each column of the table stands for.
COLUMNS = {
    "forward": ("forward",),
    "logits": ("logits path",),
    "values": ("values", "labels"),
    "gradients": ("gradients",),
    "generate": ("generate",),
    "save, load": ("save, load",),
    "right padding": ("right padding",),
    "left padding": ("left padding",),
    "generated values": ("generated values",),
    "longest": ("longest",),
}


@dataclass(frozen=True)
class Row:
    """What holds for one model type.

    Attributes:
        cells: "yes", "no" for a known limit, "n/a" where a column does not apply, else what went wrong.
        notes: Sentences, the reasons of limits among them.
    """

    model_type: str
    auto_class: str
    route: str
    cells: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return all(cell in (HOLDS, KNOWN_LIMIT, DOES_NOT_APPLY) for cell in self.cells.values())


def examine(model_type: str, auto_class: str) -> Row:
    """Builds one model and runs every check on it."""
    if (reason := left_out(model_type, auto_class)) is not None:
        return Row(model_type, auto_class, "not examined", notes=[reason])
    with _quiet():
        model = subject(model_type, auto_class)
        results = {aspect: _result(aspect, model) for aspect in ASPECTS}
    cells = {column: _cell(model_type, aspects, results) for column, aspects in COLUMNS.items()}
    return Row(model_type, auto_class, _route(model), cells, list(_notes(model, results)))


def _result(aspect: str, model: Subject) -> str:
    if not applies(aspect, model):
        return DOES_NOT_APPLY
    try:
        return ASPECTS[aspect](model)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _cell(model_type: str, aspects: tuple[str, ...], results: dict[str, str]) -> str:
    found = []
    for aspect in aspects:
        is_limit = model_type in LIMITS.get(aspect, {})
        if is_limit and results[aspect] == HOLDS:
            found.append(f"{aspect}: holds, though listed as a limit")
        elif is_limit and results[aspect] != DOES_NOT_APPLY:
            found.append(KNOWN_LIMIT)
        elif results[aspect] != DOES_NOT_APPLY:
            found.append(results[aspect])
    worst = [each for each in found if each not in (HOLDS, KNOWN_LIMIT)]
    return worst[0] if worst else min(found, default=DOES_NOT_APPLY)  # "no" before "yes"


def _route(model: Subject) -> str:
    plan = model.model.plan
    keeps_all = plan.retention is Retention.ALL_LAYERS
    return (
        f"{plan.route.value}, all layers kept" if keeps_all and plan.route is Route.FULL_FORWARD else plan.route.value
    )


def _notes(model: Subject, results: dict[str, str]) -> Iterator[str]:
    if model.trl is not None:
        yield f"TRL's class took {model.trl}; here it is the state that the language-model head reads"
    for aspect, limits in LIMITS.items():
        if model.model_type in limits and results[aspect] not in (HOLDS, DOES_NOT_APPLY):
            yield f"{aspect}: {limits[model.model_type]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what transformers logs about tiny configurations off the screen, and torch on one thread."""
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    level = logging.getLogger("vhead").level
    transformers.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("vhead").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        logging.getLogger("vhead").setLevel(level)
        torch.set_num_threads(threads)
