"""Changes to namespaces that can be taken back."""

from typing import NamedTuple

Namespace = dict[str, object]

_ABSENT = object()


class Change(NamedTuple):
    """One name in one namespace, before and after."""

    namespace: Namespace
    name: str
    before: object
    after: object


class Journal:
    """Sets names in namespaces and remembers what was there."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def set(self, namespace: Namespace, name: str, value: object) -> None:
        """Binds a name to a value, in the namespace itself: a module's own `__setattr__` is not asked."""
        before = namespace.get(name, _ABSENT)
        if before is not value:
            self.changes.append(Change(namespace, name, before, value))
            namespace[name] = value

    def undo(self) -> None:
        """Takes every change back, the last first; a name that others have bound anew since then is left alone."""
        while self.changes:
            change = self.changes.pop()
            if change.namespace.get(change.name, _ABSENT) is not change.after:
                continue
            if change.before is _ABSENT:
                del change.namespace[change.name]
            else:
                change.namespace[change.name] = change.before
