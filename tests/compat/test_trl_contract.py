"""What TRL promised about its classes: every name is here, and each assertion of its tests has a test that holds it."""

import ast
import inspect
import tomllib
import typing
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import vhead
from vhead.modeling.loading import LoadArguments

ROOT = Path(__file__).parents[2]
CONTRACT = tomllib.loads((Path(__file__).parent / "trl_contract.toml").read_text(encoding="utf-8"))
NAMES = [(row["of"], name) for row in CONTRACT["names"] for name in row["names"]]
ABSENT = [(row["of"], row["name"]) for row in CONTRACT["absent"]]
CLASSES = (
    "ValueHead",
    "PreTrainedModelWrapper",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
)
SIZES = {"vocab_size": 11}


@pytest.fixture(scope="module")
def models() -> dict[str, object]:
    """An instance of each class."""
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=16, **SIZES))
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, **SIZES))
    return {
        "ValueHead": vhead.ValueHead(gpt2.config),
        "PreTrainedModelWrapper": vhead.PreTrainedModelWrapper(gpt2),
        "AutoModelForCausalLMWithValueHead": vhead.AutoModelForCausalLMWithValueHead(gpt2),
        "AutoModelForSeq2SeqLMWithValueHead": vhead.AutoModelForSeq2SeqLMWithValueHead(t5),
    }


def has(of: str, name: str, models: dict[str, object]) -> bool:
    """Whether an object has an attribute of that name, or a function takes an argument of that name."""
    if of == "vhead":
        return hasattr(vhead, name)
    owner, _, method = of.partition(".")
    if owner in models and not method:
        return hasattr(models[owner], name)
    return name in arguments_of(getattr(getattr(vhead, owner), method) if method else getattr(vhead, owner))


def arguments_of(function: typing.Any) -> set[str]:
    """The names that a function's signature states, those of an unpacked dictionary among them."""
    names = set(inspect.signature(function).parameters)
    for hint in typing.get_type_hints(function).values():
        if typing.get_origin(hint) is typing.Unpack:
            names |= set(typing.get_args(hint)[0].__annotations__)
    # `from_pretrained` divides its keyword arguments itself.
    return names | {field.name for field in fields(LoadArguments)} if function.__name__ == "from_pretrained" else names


@pytest.mark.parametrize(("of", "name"), NAMES)
def test_every_name_of_trls_classes_is_here(of: str, name: str, models: dict[str, object]) -> None:
    assert has(of, name, models)


@pytest.mark.parametrize(("of", "name"), ABSENT)
def test_what_is_absent_is_absent_and_told(of: str, name: str, models: dict[str, object]) -> None:
    assert not has(of, name, models)
    assert f"`{name}`" in (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")


def test_the_classes_of_trl_that_is_installed_have_no_other_names() -> None:
    """The table is whole for the newest release that has the classes."""
    theirs = pytest.importorskip("trl.experimental.ppo.modeling_value_head", exc_type=ImportError)
    listed = {name for of, name in (*NAMES, *ABSENT) if of in CLASSES}
    for cls in CLASSES:
        own = vars(getattr(theirs, cls))
        assert {name for name in own if not name.startswith("__")} <= listed, cls


def names_of_tests(path: Path) -> set[str]:
    """The test functions of a file, which is not imported."""
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def lacking(held_by: list[str]) -> list[str]:
    """Those of the named tests that do not exist."""
    pairs = [test.partition("::") for test in held_by]
    return [f"{path}::{name}" for path, _, name in pairs if name not in names_of_tests(ROOT / path)]


@pytest.mark.parametrize("row", CONTRACT["assertion"], ids=lambda row: row["says"].replace(" ", "_"))
def test_every_assertion_of_trls_tests_is_held(row: dict[str, typing.Any]) -> None:
    assert row["held_by"]
    assert lacking(row["held_by"]) == []
    assert row["test"].startswith("test_")
    assert row["trl"]


def test_a_test_that_is_gone_is_noticed() -> None:
    here = "tests/compat/test_trl_contract.py"
    gone = [f"{here}::test_nothing", "tests/compat/gone.py::test_a_test_that_is_gone_is_noticed"]
    assert lacking([f"{here}::test_a_test_that_is_gone_is_noticed", *gone]) == gone


def test_every_row_is_whole() -> None:
    assert all(row["names"] and row["trl"] for row in CONTRACT["names"])
    assert all(row["why"] and row["trl"] for row in CONTRACT["absent"])
    assert all(row["tests"] and row["why"] and row["trl"] for row in CONTRACT["left_out"])
    assert len(NAMES) == len(set(NAMES))
