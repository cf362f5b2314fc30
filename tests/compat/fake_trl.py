"""Packages named trl with the module layout of each range of releases, and none of its code."""

import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from vhead.compat.trl.names import NAMES

# Makes a version's layout, or no trl at all, what this process imports.
World = Callable[[str | None], Path]

NAMED = [(module, name) for module, names in NAMES.items() for name in names]

CAUSAL, SEQ2SEQ, WRAPPER = (
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
)

LAZY = """
import importlib, sys, types


class LazyModule(types.ModuleType):
    def __init__(self, spec, where):
        super().__init__(spec.name)
        self.__spec__, self.__path__, self.__file__ = spec, spec.submodule_search_locations, spec.origin
        self._where = {name: module for module, names in where.items() for name in names}
        self._modules = set(where)

    def __getattr__(self, name):
        if name in self._modules:
            value = importlib.import_module(f"{self.__name__}.{name}")
        elif name in self._where:
            value = getattr(getattr(self, self._where[name]), name)
        else:
            raise AttributeError(f"module {self.__name__} has no attribute {name}")
        setattr(self, name, value)
        return value
"""


def lazy(where: dict[str, list[str]], home: str = "trl._lazy_module") -> str:
    return f"import sys\nfrom {home} import LazyModule\nsys.modules[__name__] = LazyModule(__spec__, {where!r})\n"


BASE = f"class {WRAPPER}:\n    pass\n"
REFERENCE = "def create_reference_model(model):\n    return ('trl', model)\n"
HEADS = f"""
class ValueHead:
    pass


class {CAUSAL}({WRAPPER}):
    pass


class {SEQ2SEQ}({WRAPPER}):
    pass
"""
PPO_TRAINER = f"""
from ..models import SUPPORTED_ARCHITECTURES, {WRAPPER}, create_reference_model


class PPOTrainer:
    def __init__(self, model):
        if not isinstance(model, SUPPORTED_ARCHITECTURES):
            raise ValueError(f"{{type(model)}} is not one of {{SUPPORTED_ARCHITECTURES}}")
        self.ref_model = create_reference_model
"""
EXPERIMENTAL_PPO = f"from .modeling_value_head import {CAUSAL}, {SEQ2SEQ}, {WRAPPER}\nclass PPOTrainer:\n    pass\n"
WARNS = "import warnings\nwarnings.warn('experimental', UserWarning, stacklevel=2)\n"


def stub(names: list[str]) -> str:
    """The subclasses that 0.27 and 0.28 left where the classes had been."""
    moved = "".join(f"from ..experimental.ppo import {name} as _{name}\n" for name in names)
    return moved + "".join(f"class {name}(_{name}):\n    left_behind = True\n" for name in names)


EXPORTED = [CAUSAL, SEQ2SEQ, WRAPPER, "create_reference_model"]

ORIGINAL = {  # 0.9 to 0.26
    "__init__": lazy(
        {"models": [*EXPORTED, "SUPPORTED_ARCHITECTURES"], "trainer.ppo_trainer": ["PPOTrainer"], "trainer": []}
    ),
    "models.__init__": lazy(
        {
            "modeling_base": [WRAPPER, "create_reference_model", "GeometricMixtureWrapper"],
            "modeling_value_head": [CAUSAL, SEQ2SEQ],
            "utils": ["SUPPORTED_ARCHITECTURES"],
        }
    ),
    "models.modeling_base": f"{BASE}{REFERENCE}class GeometricMixtureWrapper:\n    pass\n",
    "models.modeling_value_head": f"from .modeling_base import {WRAPPER}\n{HEADS}",
    "models.utils": f"from .modeling_value_head import {CAUSAL}, {SEQ2SEQ}\n"
    f"SUPPORTED_ARCHITECTURES = ({CAUSAL}, {SEQ2SEQ})\n",
    "trainer.__init__": "",
    "trainer.ppo_trainer": PPO_TRAINER,
}
EXPERIMENTAL = {
    "experimental.__init__": WARNS,
    "experimental.ppo.__init__": EXPERIMENTAL_PPO,
    "experimental.ppo.modeling_value_head": BASE + HEADS,
}
MOVED = EXPERIMENTAL | {  # 0.27 and 0.28
    "__init__": lazy({"models": EXPORTED}),
    "models.__init__": lazy(
        {
            "modeling_base": [WRAPPER],
            "modeling_value_head": [CAUSAL, SEQ2SEQ],
            "utils": ["create_reference_model"],
        }
    ),
    "models.modeling_base": stub([WRAPPER]),
    "models.modeling_value_head": stub([CAUSAL, SEQ2SEQ]),
    "models.utils": REFERENCE,
}
LATER = {
    "__init__": lazy({"models": ["create_reference_model"]}),
    "models.__init__": lazy({"utils": ["create_reference_model"]}),
    "models.utils": "from ..experimental.utils import create_reference_model as _create\n" + REFERENCE,
    "experimental.utils": REFERENCE,
}
# 0.29 to 1.12, and from 1.13
LAYOUTS = {
    "0.11.4": ORIGINAL,
    "0.28.0": MOVED,
    "1.12.0": EXPERIMENTAL | LATER,
    "1.16.0": {"experimental.__init__": WARNS} | LATER,
}


def write(version: str, folder: Path) -> None:
    """Writes the package of a release, and the metadata that names its version."""
    for name, source in ({"_lazy_module": LAZY} | LAYOUTS[version]).items():
        path = folder / "trl" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    metadata = folder / f"trl-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n")


def trl_modules() -> dict[str, object]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "trl"}


def forget_trl() -> None:
    for name in trl_modules():
        del sys.modules[name]


def imported(module: str, name: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return getattr(importlib.import_module(module), name)


def load_everything() -> None:
    """Imports every name that the trl of this world has."""
    for module, name in NAMED:
        try:
            imported(module, name)
        except (ImportError, AttributeError):
            continue


# What hides an installed trl from an interpreter that starts with it as its sitecustomize.
HIDING = """
import sys
from importlib.machinery import PathFinder


class WithoutTrl:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] == "trl" else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(context=None):
        return iter(()) if context and context.name == "trl" else PathFinder.find_distributions(context)


sys.meta_path[:] = [WithoutTrl if finder is PathFinder else finder for finder in sys.meta_path]
"""
