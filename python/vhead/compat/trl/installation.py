"""Installing the names, taking them back, and saying which of the two holds."""

import logging
import sys
import threading
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import NamedTuple

from vhead.compat.trl import namespaces, workers
from vhead.compat.trl.finder import Finder
from vhead.compat.trl.journal import Journal
from vhead.compat.trl.names import NAMES
from vhead.compat.trl.stand_in import installed_version, is_stand_in

logger = logging.getLogger("vhead")


class Status(NamedTuple):
    """What stands where, in this process.

    Attributes:
        installed: Whether the names are vhead's.
        trl: The version of the trl that is installed, None without one.
        stand_ins: Loaded modules that are vhead's alone.
        overlaid: Loaded modules of trl's that have vhead's names in them.
        rebound: Names, as `module.name`, that were bound to trl's objects before, and are bound to vhead's now.
        workers: Whether Python processes that this one starts have the names from their start.
    """

    installed: bool
    trl: str | None
    stand_ins: tuple[str, ...]
    overlaid: tuple[str, ...]
    rebound: tuple[str, ...]
    workers: bool

    def __str__(self) -> str:
        lines = [
            f"trl's value-head names are {'vhead' if self.installed else 'trl'}'s",
            f"trl: {self.trl or 'not installed'}",
            f"stand-ins: {', '.join(self.stand_ins) or 'none loaded'}",
            f"overlaid: {', '.join(self.overlaid) or 'none loaded'}",
            f"rebound: {', '.join(self.rebound) or 'none'}",
            f"worker processes: {'as here' if self.workers else 'not reached'}",
        ]
        return "\n".join(lines)


class Installation:
    """What `install` returns: as a context manager it uninstalls at the end, unless the names were installed before."""

    def __init__(self, *, first: bool) -> None:
        self._first = first

    def __enter__(self) -> "Installation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._first:
            uninstall()


class _Active:
    """Everything that an installation has changed."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.finder = Finder(self._overlay)
        self.leave_workers: Callable[[], None] = lambda: None

    def _overlay(self, module: ModuleType) -> None:
        # A module may finish loading in one thread after another has uninstalled.
        if self.finder in sys.meta_path:
            namespaces.overlay(module, self.journal)

    def start(self, *, reach_workers: bool) -> None:
        sys.meta_path.insert(0, self.finder)
        known = namespaces.originals()
        for name in NAMES:
            if NAMES[name] and name in sys.modules:
                namespaces.overlay(sys.modules[name], self.journal)
        if known:
            namespaces.rebind(known, self.journal)
        if reach_workers:
            self.leave_workers = workers.reach_workers()
        for late in namespaces.subclasses(known):
            logger.warning("%s was derived from trl's class before install(), and still is", late)

    def stop(self) -> None:
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        self.leave_workers()
        self.journal.undo()
        _unload_stand_ins()
        namespaces.give_back()


_lock = threading.RLock()
_active: _Active | None = None


def install(*, reach_workers: bool = True) -> Installation:
    """Makes trl's value-head names vhead's, in this process and in the Python processes that it starts.

    It is cheap, and imports neither trl nor torch: modules are changed when something imports them. Modules that are
    loaded already are changed at once, and so are the names that others imported from them. Installing again changes
    nothing.

    Args:
        reach_workers: Whether `PYTHONPATH` is changed so that worker processes have the names as well.
    """
    global _active  # noqa: PLW0603, imports are the process's own
    with _lock:
        if _active is not None:
            return Installation(first=False)
        active = _Active()
        try:
            active.start(reach_workers=reach_workers)
        except BaseException:
            active.stop()
            raise
        _active = active
        logger.info("install: %s", str(status()).replace("\n", "; "))
        return Installation(first=True)


def uninstall() -> None:
    """Puts back what was there: import hooks, modules, names in modules, the environment. Calling it twice is harmless.

    What other code has imported meanwhile stays bound in it; only trl's own modules are given trl's own objects again.
    """
    global _active
    with _lock:
        if _active is None:
            return
        active, _active = _active, None
        active.stop()
        logger.info("uninstall: trl's value-head names are trl's again")


def status() -> Status:
    """Says what is installed, and which modules and names it has changed so far."""
    with _lock:
        loaded = [name for name in NAMES if name in sys.modules]
        stand_ins = tuple(name for name in loaded if is_stand_in(sys.modules[name]))
        return Status(
            installed=_active is not None,
            trl=installed_version(),
            stand_ins=stand_ins,
            overlaid=tuple(name for name in loaded if name not in stand_ins) if _active else (),
            rebound=_rebound(_active.journal) if _active else (),
            workers=workers.reaches_workers(),
        )


def _rebound(journal: Journal) -> tuple[str, ...]:
    changes = [change for change in journal.changes if change.name != "__getattr__"]
    return tuple(f"{change.namespace.get('__name__')}.{change.name}" for change in changes)


def _unload_stand_ins() -> None:
    for name in sorted(NAMES, reverse=True):
        module = sys.modules.get(name)
        if is_stand_in(module):
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            siblings = vars(sys.modules[parent]) if parent in sys.modules else {}
            if siblings.get(child) is module:
                del siblings[child]
