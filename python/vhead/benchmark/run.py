"""One run of `vhead bench`: first the bits, then what else must hold, then time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vhead.benchmark import comparison
from vhead.benchmark.cases import (
    COPY,
    Case,
    copying,
    kept_bytes,
    time_backward,
    time_dropout,
    time_inference,
    time_training,
)
from vhead.benchmark.checks import run_checks
from vhead.benchmark.document import Document, Row, dtype_name
from vhead.benchmark.machine import device_facts, find_device, provenance
from vhead.benchmark.peers import Peer, Weights, compiled, trl_path, vhead_module, vhead_op
from vhead.benchmark.timing import load_average
from vhead.benchmark.trl_head import trl_absence, trl_head
from vhead.errors import BenchmarkError

Shape = tuple[int, int]
Notify = Callable[[str], None]

# By device type: shapes [N, H] of a usual run. On a GPU they are larger than its caches.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((8192, 2048), (8192, 896), (8192, 4096)),
    "cuda": ((65536, 2048), (32768, 4096), (16384, 8192)),
}
QUICK_SHAPES: dict[str, tuple[Shape, ...]] = {"cpu": ((2048, 2048),), "cuda": ((32768, 4096),)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK_DTYPES = (torch.bfloat16, torch.float32)
ROUNDS, QUICK_ROUNDS = 21, 7


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        device: Where.
        shapes: Hidden states [N, H].
        dtypes: Their dtypes.
        rounds: Turns of each contestant.
        compiles: Whether plain torch is measured under `torch.compile` as well.
        quick: Whether fewer settings are compared, and TRL's own class is left out: importing it takes seconds.
    """

    device: torch.device
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    rounds: int
    compiles: bool = False
    quick: bool = False

    @classmethod
    def usual(
        cls,
        device: str | None = None,
        *,
        shapes: tuple[Shape, ...] = (),
        dtypes: tuple[torch.dtype, ...] = (),
        rounds: int | None = None,
        compiles: bool = False,
        quick: bool = False,
    ) -> "Request":
        """What is not given, as it fits the device.

        Raises:
            BenchmarkError: There is no such device.
        """
        found = find_device(device)
        return cls(
            found,
            shapes or (QUICK_SHAPES if quick else SHAPES)[found.type],
            dtypes or (QUICK_DTYPES if quick else DTYPES),
            rounds or (QUICK_ROUNDS if quick else ROUNDS),
            compiles,
            quick,
        )


def run(request: Request, notify: Notify = lambda _: None) -> Document:
    """Compares, checks and measures.

    Raises:
        BenchmarkError: The device is too small for a shape, or `torch.compile` does not work here.
    """
    notes = [note for note in (trl_absence(),) if note] if not request.quick else []
    source = provenance(torch.get_num_threads(), request.rounds) | device_facts(request.device)
    document = Document(source | {"load_before": load_average(), "notes": notes})
    notify("comparing bits with the CPU")
    plans = comparison.FULL if request.device.type == "cuda" and not request.quick else comparison.QUICK
    document.comparisons = comparison.compare_with_cpu(request.device, plans)
    notify("checking seeds, streams and statistics")
    document.checks = list(run_checks(request.device))
    if request.compiles:
        check_compiler(request.device)
    for shape in request.shapes:
        for dtype in request.dtypes:
            notify(f"measuring {list(shape)} {dtype_name(dtype)}")
            _measure(request, shape, dtype, document)
    document.provenance["load_after"] = load_average()
    return document


def make_peers(request: Request) -> Callable[[Weights], list[Peer]]:
    """Everything that can be measured here without another package."""

    def make(weights: Weights) -> list[Peer]:
        peers = [vhead_module(weights), vhead_op(weights), trl_path(weights)]
        if request.compiles:
            peers.append(compiled(trl_path(weights)))
        if not request.quick and trl_absence() is None:
            peers.append(trl_head(weights))
        return peers

    return make


def check_compiler(device: torch.device) -> None:
    """Compiles something small.

    Raises:
        BenchmarkError: It does not work.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever a compiler's absence looks like
        reason = str(error).partition("\n")[0]
        raise BenchmarkError(f"compile: torch.compile does not work here: {reason}") from error


def _measure(request: Request, shape: Shape, dtype: torch.dtype, document: Document) -> None:
    torch.compiler.reset()
    try:
        case = Case.draw(shape, dtype, make_peers(request), request.rounds, request.device)
        document.times += _timings(case)
        document.saved += kept_bytes(case.without("compiled"))
    except torch.cuda.OutOfMemoryError as error:
        raise BenchmarkError(
            f"shape: expected hidden states that fit the memory of {request.device} several times, "
            f"got {list(shape)} {dtype}"
        ) from error


def _timings(case: Case) -> Iterator[Row]:
    yield from time_inference(case, {COPY: copying(case.hidden)})
    yield from time_dropout(case)
    # A compiled backward may use the memory of what it was given, so that it cannot run twice on one graph.
    yield from time_backward(case.without("compiled"))
    yield from time_training(case)
