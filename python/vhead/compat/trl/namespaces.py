"""The names in modules that are loaded: what is rebound to vhead's classes, and what is given back."""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

from vhead.compat.trl.journal import Journal, Namespace
from vhead.compat.trl.names import NAMES, REFERENCE, SUPPORTED, look_up, own_values, value_of

logger = logging.getLogger("vhead")

# Where trl's own objects are found again.
_HOMES_OF_CLASSES = (
    "trl.models.modeling_value_head",
    "trl.models.modeling_base",
    "trl.experimental.ppo.modeling_value_head",
)
_HOMES_OF_REFERENCE = ("trl.models.utils", "trl.models.modeling_base", "trl.experimental.utils")


def overlay(module: ModuleType, journal: Journal) -> None:
    """Gives a loaded module of trl's vhead's names: those that it has are replaced, the others answered on demand."""
    namespace = vars(module)
    own = own_values()
    for name in NAMES[module.__name__]:
        if name in namespace and name != SUPPORTED and id(namespace[name]) not in own:
            journal.set(namespace, name, value_of(name))
    journal.set(namespace, "__getattr__", _answering(module.__name__, namespace.get("__getattr__")))


def originals() -> dict[int, tuple[str, object]]:
    """The classes and functions of trl's own in its modules that are loaded, by identity, with their names."""
    own = own_values()
    return {
        id(value): (name, value)
        for module, names in NAMES.items()
        for name, value in _namespace(sys.modules.get(module)).items()
        if name in names and callable(value) and id(value) not in own
    }


def rebind(known: Mapping[int, tuple[str, object]], journal: Journal) -> None:
    """Rebinds trl's own objects to vhead's in every loaded module, and extends the tuples that hold its classes.

    A tuple keeps trl's classes beside vhead's, so that `isinstance` accepts models that were made before.
    """
    for _, namespace in _loaded(lambda name: not name.startswith("vhead.")):
        for name, value in list(namespace.items()):
            if id(value) in known:
                journal.set(namespace, name, value_of(known[id(value)][0]))
            elif type(value) is tuple and any(id(item) in known for item in value):
                journal.set(namespace, name, _extended(value, known))


def give_back() -> None:
    """Rebinds vhead's objects to trl's own in the modules of trl that were loaded meanwhile."""
    own = own_values()
    holders = _loaded(lambda name: name.split(".")[0] == "trl")
    # Where the classes moved to `trl.experimental`, what stayed behind derives from what its modules hold.
    for holder, namespace in sorted(holders, key=lambda loaded: not loaded[0].startswith("trl.experimental")):
        for name, value in list(namespace.items()):
            held = value if type(value) is tuple else (value,)
            if any(id(item) in own for item in held):
                restored = [_original(own[id(item)], holder) if id(item) in own else item for item in held]
                if None in restored:
                    logger.warning("%s.%s stays vhead's: trl's own cannot be imported", holder, name)
                else:
                    namespace[name] = tuple(dict.fromkeys(restored)) if type(value) is tuple else restored[0]


def subclasses(known: Mapping[int, tuple[str, object]]) -> list[str]:
    """Classes outside trl that were derived from trl's own, and stay derived from them."""
    derived: list[type] = []
    for _, original in known.values():
        derived += original.__subclasses__() if isinstance(original, type) else []
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in derived}
    return sorted(name for name in names if not name.startswith("trl."))


def _answering(module: str, before: object) -> Callable[[str], object]:
    """A module's `__getattr__` that knows the names of the table, and then asks the one before it."""

    def getattr_(name: str) -> object:
        try:
            return look_up(module, name)
        except KeyError:
            if callable(before):
                return before(name)
            # A lazy module's class has its own `__getattr__`, which Python asks next.
            raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name) from None

    return getattr_


def _extended(held: tuple[object, ...], known: Mapping[int, tuple[str, object]]) -> tuple[object, ...]:
    replaced = [value_of(known[id(item)][0]) for item in held if id(item) in known]
    return (*(cls for cls in replaced if cls not in held), *held)


def _original(name: str, holder: str) -> object | None:
    """What trl itself has under a name, as a module of trl's would import it; None if it cannot be."""
    experimental = holder.startswith("trl.experimental")
    homes = _HOMES_OF_REFERENCE if name == REFERENCE else _HOMES_OF_CLASSES
    for home in sorted(homes, key=lambda home: home.startswith("trl.experimental") != experimental):
        try:
            return getattr(importlib.import_module(home), name)  # type: ignore[no-any-return]
        except (ImportError, AttributeError, RuntimeError):  # RuntimeError: what trl's lazy modules make of the first.
            continue
    return None


def _loaded(accept: Callable[[str], bool]) -> Iterator[tuple[str, Namespace]]:
    for name, module in list(sys.modules.items()):
        if accept(name):
            yield name, _namespace(module)


def _namespace(module: object) -> Namespace:
    # Some programs put objects into sys.modules that are no modules.
    return vars(module) if isinstance(module, ModuleType) else {}
