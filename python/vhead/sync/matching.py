"""Which published tensor goes where in a model; what does not fit is found before anything is read."""

from collections.abc import Iterable
from dataclasses import dataclass

from vhead import _native
from vhead.checkpoints.tensor_files import TORCH_DTYPES
from vhead.errors import PublicationMismatchError
from vhead.sync.weights import Weight

_NAMES_SHOWN = 8

Placed = list[tuple[int, Weight]]


@dataclass(frozen=True)
class Match:
    """Published tensors, by their places, and the weights that they are for.

    Attributes:
        direct: Those that are copied as they are, byte by byte.
        others: Those that torch has to copy: to a device, into another dtype or another order.
        also: Further names of weights that are tied in the model.
    """

    direct: Placed
    others: Placed
    also: Placed


def matched(stage: "_native.SyncStage", weights: list[Weight], *, convert: bool) -> Match:
    """Finds the weight for each published tensor.

    Raises:
        PublicationMismatchError: There is a tensor more or less, of another shape or dtype, or weights that are tied in
            the model differ.
    """
    published = stage.tensors
    by_name = {name: weight for weight in weights for name in weight.names}
    unknown = [name for name, _, _ in published if name not in by_name]
    present = {name for name, _, _ in published}
    missing = [weight.name for weight in weights if present.isdisjoint(weight.names)]
    if unknown or missing:
        problems = [*_problem("tensors that the model does not have", unknown), *_problem("no", missing)]
        raise PublicationMismatchError(
            f"step {stage.summary[0]}: expected the model's tensors, found {' and '.join(problems)}"
        )
    match, digests = Match([], [], []), stage.digests
    first: dict[int, int] = {}
    for place, (name, dtype, shape) in enumerate(published):
        weight = by_name[name]
        _check(stage.summary[0], name, dtype, shape, weight, convert=convert)
        before = first.setdefault(id(weight), place)
        if before != place:
            if digests[before] != digests[place]:
                raise PublicationMismatchError(
                    f"step {stage.summary[0]}: {name}: expected the same as {published[before][0]}, to which it is "
                    "tied in the model, found other values"
                )
            match.also.append((place, weight))
        elif weight.is_plain and weight.dtype == dtype:
            match.direct.append((place, weight))
        else:
            match.others.append((place, weight))
    return match


def _check(step: int, name: str, dtype: str, shape: list[int], weight: Weight, *, convert: bool) -> None:
    own = list(weight.tensor.shape)
    if weight.is_sharded:
        raise PublicationMismatchError(f"{name}: expected a whole tensor to bring weights into, got a sharded one")
    if own != list(shape):
        raise PublicationMismatchError(f"step {step}: {name}: expected shape {own}, as the model has it, got {shape}")
    if weight.dtype != dtype and not (convert and weight.tensor.is_floating_point() and dtype in TORCH_DTYPES):
        raise PublicationMismatchError(
            f"step {step}: {name}: expected {weight.dtype}, as the model has it, got {dtype}; "
            "convert=True converts floating-point weights"
        )


def _problem(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return [f"{what} {', '.join(names[:_NAMES_SHOWN])}{more}"]
