"""A module under one of trl's names that holds vhead's classes and nothing else.

Such a module stands where the installed trl has no module of that name, or where no trl is installed, and for trl's own
`modeling_value_head`. If an error message brought you here: what you were importing is not about value heads, and only
trl itself has it.
"""

from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import spec_from_file_location
from types import ModuleType

from vhead.compat.trl.names import NAMES, look_up


class StandInLoader(Loader):
    """Fills a module with the names of the table, each imported on first use."""

    def exec_module(self, module: ModuleType) -> None:
        names = NAMES[module.__name__]
        module.__doc__ = f"vhead's stand-in for trl's module of this name: {', '.join(names) or 'submodules only'}."
        vars(module).update(__all__=list(names), __getattr__=_getattr(module.__name__), __dir__=lambda: sorted(names))


def spec_of(name: str) -> ModuleSpec:
    """The specification of the stand-in of that name; its file is this one, which error messages then show."""
    is_package = any(other.startswith(f"{name}.") for other in NAMES)
    locations: list[str] | None = [] if is_package else None
    spec = spec_from_file_location(name, __file__, loader=StandInLoader(), submodule_search_locations=locations)
    if spec is None:  # Only where a loader is not given.
        raise ImportError(f"no specification for {name}", name=name)
    spec.cached = None
    return spec


def is_stand_in(module: ModuleType | None) -> bool:
    """Whether a module is such a stand-in."""
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), StandInLoader)


def installed_version() -> str | None:
    """The version of the trl that is installed, without importing it; None without one."""
    try:
        return version("trl")
    except PackageNotFoundError:
        return None


def _getattr(module: str) -> Callable[[str], object]:
    def getattr_(name: str) -> object:
        try:
            return look_up(module, name)
        except KeyError:
            raise AttributeError(_refusal(module, name), name=name) from None

    return getattr_


def _refusal(module: str, name: str) -> str:
    number = installed_version()
    installed = "trl is not installed" if number is None else f"trl {number} is installed"
    return (
        f"module {module!r} has no attribute {name!r}: {installed}, and this module is vhead's stand-in, "
        f"which holds {', '.join(NAMES[module]) or 'no names of its own'}"
    )
