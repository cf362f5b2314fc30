"""The public names: each exists, they are listed once, and the light ones need no torch."""

import ast
import importlib
import pickle
import typing
from collections.abc import Callable
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
        vhead.CriticHead  # noqa: B018


def test_what_type_checkers_see_is_what_is_exported() -> None:
    tree = ast.parse(Path(vhead.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported | {"__version__"} == set(vhead.__all__)
    assert vhead.__all__ == sorted(vhead.__all__)


@pytest.mark.parametrize("name", [name for name in vhead.__all__ if name[0].isupper()])
def test_classes_pickle_by_reference(name: str) -> None:
    cls = getattr(vhead, name)
    assert pickle.loads(pickle.dumps(cls)) is cls  # noqa: S301, our own bytes
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
