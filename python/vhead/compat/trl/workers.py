"""How a program's worker processes come to have the names as well.

Python runs `sitecustomize` at the start of every process, before any other code. A folder with such a module, put first
on the `PYTHONPATH` that child processes inherit, reaches every one of them, however it is started: multiprocessing's
spawn and forkserver, data loaders, torchrun, accelerate's launcher, subprocesses. multiprocessing's own way, to run the
main module again, reaches neither the other launchers nor programs that install under `if __name__ == "__main__"`.
"""

import os
from collections.abc import Callable, MutableMapping

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "startup")

_VARIABLE = "PYTHONPATH"


def reaches_workers(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether Python processes with this environment have the names from their start."""
    return FOLDER in environment.get(_VARIABLE, "").split(os.pathsep)


def reach_workers(environment: MutableMapping[str, str] = os.environ) -> Callable[[], None]:
    """Changes the environment that child processes inherit, and returns what takes the change back."""
    if reaches_workers(environment):
        return lambda: None
    before = environment.get(_VARIABLE)
    # An empty entry would be the current folder.
    after = os.pathsep.join([FOLDER, *([before] if before else [])])
    environment[_VARIABLE] = after

    def undo() -> None:
        now = environment.get(_VARIABLE)
        if now == after and before is None:
            del environment[_VARIABLE]
        elif now == after:
            environment[_VARIABLE] = before or ""
        elif now is not None:
            environment[_VARIABLE] = os.pathsep.join(entry for entry in now.split(os.pathsep) if entry != FOLDER)

    return undo
