"""Every model type of the installed transformers holds what `docs/model-types.md` says of it."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from tests.architectures.limits import LEFT_OUT, LEFT_OUT_OF_CLASS, LIMITS, left_out
from tests.architectures.report import Row, examine
from tests.architectures.table import documented_rows, documented_versions, line_of, render
from tests.architectures.tiny import model_types
from vhead import AutoModelForCausalLMWithValueHead
from vhead.backbone import hidden_states
from vhead.backbone.padding import Padding
from vhead.modeling import generation, wrapper

PAGE = (Path(__file__).parents[2] / "docs" / "model-types.md").read_text(encoding="utf-8")
IS_DOCUMENTED_VERSION = documented_versions(PAGE)[0] == transformers.__version__
# What transformers itself warns about when it builds, runs or saves its own models.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way to train:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning"),
]


# Elsewhere transformers' own models have other limits than those listed: families that held all in 4.45 and 4.57.
FAMILIES = {
    *("bart", "bloom", "cohere", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "llama", "mamba"),
    *("mixtral", "mt5", "olmo", "openai-gpt", "opt", "phi3", "qwen2", "qwen2_moe", "stablelm", "starcoder2", "t5"),
}
EXAMINED = [each for each in model_types() if IS_DOCUMENTED_VERSION or each[0] in FAMILIES]


@pytest.mark.parametrize(("model_type", "auto_class"), EXAMINED, ids=lambda value: value.removeprefix("AutoModelFor"))
def test_every_model_type_holds_what_is_documented(model_type, auto_class):
    row = examine(model_type, auto_class)
    assert row.holds, row
    if IS_DOCUMENTED_VERSION:
        assert line_of(row) == documented_rows(PAGE)[model_type, auto_class]


@pytest.mark.skipif(not IS_DOCUMENTED_VERSION, reason="the page was written with another version of transformers")
def test_the_page_lists_every_model_type():
    assert documented_rows(PAGE).keys() == set(model_types())
    named = {model_type for each in LIMITS.values() for model_type in each}
    assert {model_type for model_type, _ in model_types()} >= LEFT_OUT.keys() | named
    assert set(model_types()) >= LEFT_OUT_OF_CLASS.keys()


def test_the_page_s_counts_are_those_of_its_rows():
    rows = documented_rows(PAGE)
    others = sum(left_out(*row) is not None for row in rows)
    assert f"{len(rows)} model types, counted once" in PAGE
    assert f"{len(rows) - others} of them are examined, and hold" in PAGE
    assert "| fails |" not in PAGE


# Runs padded rows as they are given.
AS_IT_IS = SimpleNamespace(run=lambda states_of, inputs, _padding, **_: states_of(inputs))


@contextmanager
def slightly_off(observed, *args):
    with observed(*args) as state:
        yield lambda: state() * 1.01


@pytest.mark.parametrize(
    ("model_type", "column", "breakage"),
    [
        ("llama", "forward", ("run", lambda run: lambda *args: (run(*args)[0], run(*args)[1] + 1e-3))),
        ("llama", "values", ("last_hidden_state", lambda last: lambda *args, **inputs: last(*args, **inputs) * 1.001)),
        ("llama", "gradients", ("last_hidden_state", lambda last: lambda *a, **inputs: last(*a, **inputs).detach())),
        ("recurrent_gemma", "left padding", ("padding", lambda _module: AS_IT_IS)),
        ("bart", "left padding", ("padding", lambda _module: AS_IT_IS)),
        ("cpmant", "right padding", ("plan_for", lambda plan: lambda m: replace(plan(m), padding=Padding.BEHIND))),
        ("llama", "generated values", ("observed", lambda observed: partial(slightly_off, observed))),
    ],
)
def test_the_checks_can_fail(monkeypatch, model_type, column, breakage):
    name, broken = breakage
    for module in (hidden_states, wrapper, generation):
        if name in vars(module):
            monkeypatch.setattr(module, name, broken(getattr(module, name)))
    assert examine(model_type, "AutoModelForCausalLM").cells[column] not in {"yes", "no"}


def test_the_checks_see_other_weights_after_loading(monkeypatch):
    load = AutoModelForCausalLMWithValueHead.from_pretrained

    def forgetful(folder):
        model = load(folder)
        with torch.no_grad():
            model.pretrained_model.get_input_embeddings().weight[5, 3] += 1e-6
        return model

    monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "from_pretrained", forgetful)
    assert "tensors differ" in examine("llama", "AutoModelForCausalLM").cells["save, load"]


def test_a_row_that_fails_is_told_from_one_that_holds():
    good = Row("llama", "AutoModelForCausalLM", "base model", {"forward": "yes", "left padding": "no"})
    bad = Row("llama", "AutoModelForCausalLM", "base model", {"forward": "differs by 1.0e-01"})
    assert good.holds
    assert not bad.holds
    assert "| fails |" in render([bad], transformers="0", torch="0")
