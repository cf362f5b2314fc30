"""Runs a kernel: which lanes run which instruction next.

Lanes at one instruction run together, those at the lowest instruction first, so that the two ways of a branch meet
again where they join. Blocks run side by side as lanes of one array. A program without races computes the same in any
order, and races are reported (`memory`), so one order is enough.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np

from tests.cuda.emulation.ptx import floating, integers  # noqa: F401, they fill the table of operations
from tests.cuda.emulation.ptx.accesses import whole_warps
from tests.cuda.emulation.ptx.errors import BarrierError, EndlessError
from tests.cuda.emulation.ptx.lanes import ALL, Array, At, Lanes
from tests.cuda.emulation.ptx.operands import reader
from tests.cuda.emulation.ptx.operations import Step, decode, unknown
from tests.cuda.emulation.ptx.syntax import Instruction, Kernel

_RUNNING, _EXITED = -1, -2
_END = 1 << 30


class Program:
    """A kernel, decoded."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @cached_property
    def steps(self) -> list[Step | None]:
        """What each instruction does; None for control flow."""
        control = CONTROL
        return [None if i.opcode in control else decode(self.kernel, i) for i in self.kernel.instructions]

    @cached_property
    def predicates(self) -> list[Callable[[Lanes, At], Array] | None]:
        """Which lanes each instruction is for; None: for all."""
        return [_predicate(self.kernel, instruction) for instruction in self.kernel.instructions]


def _predicate(kernel: Kernel, instruction: Instruction) -> Callable[[Lanes, At], Array] | None:
    if instruction.predicate is None:
        return None
    read = reader(kernel, instruction.predicate, "pred")
    return (lambda lanes, at: ~read(lanes, at)) if instruction.negated else read


class Machine:
    """Some blocks at work."""

    def __init__(self, program: Program, lanes: Lanes, most_instructions: int) -> None:
        self._program, self._lanes, self._kernel = program, lanes, program.kernel
        self._ready: dict[int, list[Array]] = {0: [np.arange(lanes.count)]}
        self._waiting = np.full(lanes.count, _RUNNING, np.int64)
        self.executed = np.zeros(len(self._kernel.instructions), np.int64)
        self._left = most_instructions

    def run(self) -> None:
        """Runs every lane to its end."""
        while self._ready or self._open_barriers():
            if self._left <= 0:
                raise EndlessError(f"{self._kernel.name}: does not end")
            place = min(self._ready)
            groups = self._ready.pop(place)
            self._run_group(place, groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups)))

    def _run_group(self, place: int, group: Array) -> None:
        """Runs lanes together until they part, stop, or reach others."""
        steps, predicates, executed = self._program.steps, self._program.predicates, self.executed
        at: At = ALL if len(group) == self._lanes.count else group
        others = min(self._ready, default=_END)
        while True:
            if place >= len(steps):
                raise unknown(self._kernel, self._kernel.instructions[-1], "is followed by nothing")
            executed[place] += 1
            self._left -= 1
            step, predicate = steps[place], predicates[place]
            holds = None if predicate is None else predicate(self._lanes, at)
            if step is None:
                self._control(self._kernel.instructions[place], place, group, holds)
                return
            chosen = at if holds is None else _chosen(holds, at, group)
            if chosen is not None:
                step(self._lanes, chosen)
            place += 1
            if place >= others:
                self._put(place, group)
                return

    def _put(self, place: int, group: Array) -> None:
        if len(group):
            self._ready.setdefault(place, []).append(group)

    def _control(self, instruction: Instruction, place: int, group: Array, holds: Array | None) -> None:
        """A branch, an end or a barrier, for the lanes whose predicate holds; the others go on."""
        taken = group
        if holds is not None:
            taken = group[holds]
            self._put(place + 1, group[~holds])
        if len(taken):
            CONTROL[instruction.opcode](self, instruction, place, taken)

    def branch(self, instruction: Instruction, _place: int, taken: Array) -> None:
        """Goes on at a label."""
        (label,) = instruction.operands
        self._put(self._kernel.labels[label], taken)

    def exit(self, _instruction: Instruction, _place: int, taken: Array) -> None:
        """Ends."""
        self._waiting[taken] = _EXITED

    def barrier(self, instruction: Instruction, place: int, taken: Array) -> None:
        """Waits for the warp, or for the block."""
        if "warp" in instruction.modifiers:
            at = ALL if len(taken) == self._lanes.count else taken
            mask = reader(self._kernel, instruction.operands[0], "u32")(self._lanes, at)
            whole_warps(self._kernel, instruction, self._lanes, at, mask)
            self._lanes.shared.end_of_warp_era(np.unique(taken // 32))
            self._put(place + 1, taken)
        elif instruction.operands != ("0",) or instruction.modifiers not in {
            ("sync",),
            ("sync", "aligned"),
            ("cta", "sync"),
        }:
            raise unknown(self._kernel, instruction)
        else:
            self._waiting[taken] = place

    def _open_barriers(self) -> bool:
        """Lets go the blocks whose every thread waits at one barrier; whether there are any."""
        waiting = self._waiting.reshape(-1, self._lanes.threads)
        blocks = np.flatnonzero((waiting >= 0).any(1))
        if not len(blocks):
            return False
        places = waiting[blocks]
        torn = places.min(1) != places.max(1)
        if torn.any():
            raise BarrierError(self._missing(int(blocks[np.flatnonzero(torn)[0]]), places[torn][0]))
        self._lanes.shared.end_of_block_era(blocks)
        for place in np.unique(places[:, 0]):
            lanes = np.flatnonzero(self._waiting == place)
            self._waiting[lanes] = _RUNNING
            self._put(int(place) + 1, lanes)
        return True

    def _missing(self, block: int, places: Array) -> str:
        at = int(places[places >= 0][0])
        count, elsewhere = int((places == at).sum()), int((places == _EXITED).sum())
        where = f"{elsewhere} have exited" if elsewhere else "the others wait at another barrier"
        text = self._kernel.instructions[at].text
        return f"{self._kernel.name}: {count} of {len(places)} threads of block {block} wait at `{text}`, {where}"


def _chosen(holds: Array, at: At, group: Array) -> At | None:
    """The lanes for which a predicate holds; None for none of them."""
    if holds.all():
        return at
    return group[holds] if holds.any() else None


CONTROL = {
    "bra": Machine.branch,
    "ret": Machine.exit,
    "exit": Machine.exit,
    "bar": Machine.barrier,
    "barrier": Machine.barrier,
}
