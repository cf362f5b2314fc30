"""The meta path finder through which imports of trl's value-head modules find vhead's classes."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from vhead.compat.trl import stand_in
from vhead.compat.trl.names import NAMES

# Where trl defined its classes. Its own code for them is never run: what it builds on them is built on vhead's.
_DEFINITIONS = ("trl.models.modeling_value_head", "trl.experimental.ppo.modeling_value_head")


class Finder(MetaPathFinder):
    """Finds the modules of the table: trl's own where it has one, with vhead's names in it, and a stand-in elsewhere.

    Args:
        overlay: Gives a module of trl's, just loaded, vhead's names.
    """

    def __init__(self, overlay: Callable[[ModuleType], None]) -> None:
        self._overlay = overlay

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of a module of the table, None for every other name."""
        if fullname not in NAMES:
            return None
        found = _find_elsewhere(fullname, path, target)
        # A specification without a loader is a folder without __init__.py: a namespace package, not trl.
        if found is None or found.loader is None or _is_definition(fullname, path):
            return stand_in.spec_of(fullname)
        if not NAMES[fullname]:
            return None
        found.loader = _OverlayLoader(found.loader, self._overlay)
        return found


class _OverlayLoader(Loader):
    """Loads a module with its own loader, then overlays it; in everything else it is that loader."""

    def __init__(self, loader: Loader, overlay: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._overlay = overlay

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # trl's packages put a lazy module in their own place.
        self._overlay(sys.modules[name])


def _find_elsewhere(fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    others = (finder for finder in sys.meta_path if not isinstance(finder, Finder))
    specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
    return next((spec for spec in specs if spec is not None), None)


def _is_definition(fullname: str, path: Sequence[str] | None) -> bool:
    if fullname != "trl.models.modeling_base":
        return fullname in _DEFINITIONS
    # In 0.27 and 0.28 it holds nothing but a subclass of the wrapper, which had moved there.
    moved = Path("experimental", "ppo", "modeling_value_head.py")
    return any((Path(folder).parent / moved).is_file() for folder in path or ())
