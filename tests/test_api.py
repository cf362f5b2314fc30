"""The public names: each exists, they are listed once, and the light ones need no torch."""

import ast
import importlib
import inspect
import pickle
import typing
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import vhead

FreshPython = Callable[[str], str]


@pytest.mark.parametrize("name", vhead.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(vhead, name) is not None
    assert name in dir(vhead)


def test_what_a_reader_is_shown_are_the_public_names() -> None:
    assert dir(vhead) == vhead.__all__


def test_type_checkers_know_what_a_model_and_its_generate_give() -> None:
    names = ("output_values", "output_logprobs", "output_entropy")
    overloads = typing.get_overloads(vhead.PreTrainedModelWrapper.generate)
    returned = [typing.get_type_hints(overload)["return"] for overload in overloads]
    assert [hint.__name__ for hint in returned[: len(names)]] == ["ScoredGeneration"] * len(names)
    outputs = [o.__annotations__["return"].__name__ for o in typing.get_overloads(vhead.PreTrainedModelWrapper.forward)]
    assert outputs == ["ValueHeadOutput", "ValueHeadOutputWithCache"]


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vhead' has no attribute 'CriticHead'"):
        vhead.CriticHead


def test_what_type_checkers_see_is_what_is_exported() -> None:
    tree = ast.parse(Path(vhead.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported | {"__version__"} == set(vhead.__all__)
    assert vhead.__all__ == sorted(vhead.__all__)


@pytest.mark.parametrize("name", [name for name in vhead.__all__ if name[0].isupper()])
def test_classes_pickle_by_reference(name: str) -> None:
    cls = getattr(vhead, name)
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert getattr(importlib.import_module(cls.__module__), name) is cls


def test_version_is_the_distribution_s() -> None:
    assert vhead.__version__ == version("vhead")


LOADED = "import sys; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"


def test_importing_the_package_imports_nothing_heavy(fresh_python: FreshPython) -> None:
    assert fresh_python(f"import vhead; vhead.__version__; {LOADED}") == "[]"


def test_candle_head_needs_no_torch(fresh_python: FreshPython) -> None:
    loaded = fresh_python(f"import vhead; vhead.CandleValueHead; {LOADED}")
    assert "torch" not in loaded
    assert "transformers" not in loaded


def test_the_torch_check_can_fail(fresh_python: FreshPython) -> None:
    assert "torch" in fresh_python(f"import vhead; vhead.ValueHead; {LOADED}")


def is_own(thing: object) -> bool:
    return callable(thing) and str(getattr(thing, "__module__", "")).startswith("vhead")


def undocumented(thing: object, name: str) -> Iterator[str]:
    """The public classes, functions and methods of one thing that do not say what they do; `vhead`'s own alone."""
    if not inspect.getdoc(thing):
        yield name
    if inspect.isclass(thing):
        for child, value in vars(thing).items():
            method = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if not child.startswith("_") and inspect.isfunction(method) and method.__module__.startswith("vhead"):
                yield from undocumented(method, f"{name}.{child}")


def test_what_is_public_says_what_it_does() -> None:
    things = {name: getattr(vhead, name) for name in vhead.__all__ if name != "__version__"}
    for module in [thing for thing in things.values() if inspect.ismodule(thing)]:
        names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        own = {name: getattr(module, name) for name in names}
        things |= {f"{module.__name__}.{name}": thing for name, thing in own.items() if is_own(thing)}
    assert [missing for name, thing in things.items() for missing in undocumented(thing, name)] == []


def test_the_rule_of_docstrings_can_fail() -> None:
    class Silent:
        """Says nothing about its method."""

        def method(self) -> None:
            pass

    Silent.method.__module__ = "vhead.silent"
    assert list(undocumented(Silent, "Silent")) == ["Silent.method"]
    assert list(undocumented(lambda: None, "function")) == ["function"]
