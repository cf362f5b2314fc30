"""Run by Python at the start of a worker process: installs the names, then runs the sitecustomize it stands before."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def _install() -> None:
    try:
        from vhead.compat.trl import install  # another environment's interpreter may lack it
    except ModuleNotFoundError as missing:
        # A subprocess of another environment is none of this package's business.
        if (missing.name or "").split(".")[0] != "vhead":
            raise
    else:
        install()


def _run_next() -> None:
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


# What the program then finds on its path is what it would find without this folder.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _FOLDER]
_install()
_run_next()
