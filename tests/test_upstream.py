"""What vhead leans on in other packages: the table of names against the sources and the installed releases."""

import ast
import logging
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput

from tests.library_versions import CONTINUES_FROM_CACHES
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer, upstream
from vhead.packing.caching import PrefixCache

PACKAGE = Path(__file__).parent.parent / "python" / "vhead"

# Names with an underscore that stand in files or are parts of names: data, not somebody's Python.
DATA = {
    "_extra_state",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_orig_mod",
    "_ids",
    "_patch_id",
    "_token_id",
    "_token_index",
}
# Attributes that other packages look for on our classes, or set on any module, so that their absence changes nothing.
PROTOCOL = {
    "_exit",  # os's
    "_gradient_checkpointing_func",  # transformers', on layers that gradient checkpointing computes again
    "_hf_hook",  # accelerate's, on modules that it offloads
    "_keys_to_ignore_on_save",
    "_no_split_modules",
    "_pad_to_mult_of_chunk_length",  # Reformer's
    "_make",  # named tuples'
    "_replace",
}


@pytest.fixture(autouse=True)
def forgets_what_was_said():
    upstream.warn_once.cache_clear()
    yield
    upstream.warn_once.cache_clear()


def model() -> AutoModelForCausalLMWithValueHead:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    body = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes))
    return AutoModelForCausalLMWithValueHead(body.eval())


@pytest.mark.parametrize("name", upstream.NAMES, ids=lambda name: name.path)
def test_a_name_is_there_in_the_releases_that_the_table_says(name):
    if not upstream.release(name.package):
        pytest.skip(f"{name.package} is not installed")
    assert name.exists() == name.is_expected()


def test_no_name_is_missing_here():
    assert list(upstream.missing_names()) == []


def private_names(tree: ast.AST) -> set[str]:
    """Names with one leading underscore that a source imports, reaches for, or spells as a whole string."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name):
                found.add(name)
            case ast.Constant(value=str(name)) if re.fullmatch(r"_[a-z]\w*", name):
                found.add(name)
            case ast.ImportFrom(module=str(module), names=aliases, level=0):
                found |= {*module.split("."), *(alias.name for alias in aliases)}
            case _:
                pass
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def own_names(tree: ast.AST) -> set[str]:
    """What a source defines or assigns."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.Name(id=name, ctx=ast.Store())
            ):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.add(name)
            case _:
                pass
    return found


def unlisted(trees: list[ast.AST]) -> set[str]:
    listed = {part.removesuffix("()") for name in upstream.NAMES for part in name.path.split(".")}
    own = set().union(*map(own_names, trees)) | {"_native"}
    return set().union(*map(private_names, trees)) - own - listed - DATA - PROTOCOL


def test_every_private_name_of_another_package_is_in_the_table():
    assert unlisted([ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]) == set()


@pytest.mark.parametrize("name", upstream.NAMES, ids=lambda name: name.path)
def test_the_table_lists_only_what_is_used(name):
    sources = (path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.stem != "upstream")
    assert any(re.search(rf"\b{name.path.rpartition('.')[2]}\b", source) for source in sources)


def test_a_private_name_that_is_not_in_the_table_is_found():
    sources = "config._secret = 1", "getattr(model, '_hidden')", "from torch._deep import thing"
    assert unlisted([ast.parse(source) for source in sources]) == {"_secret", "_hidden", "_deep"}


def test_a_name_that_a_release_drops_is_missed_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(upstream, "NAMES", (upstream.Name("torch.nn.Linear.gone", "a test"),))
    caplog.set_level(logging.WARNING)
    assert [name.path for name in upstream.missing_names()] == ["torch.nn.Linear.gone"]
    assert not upstream.available("torch.nn.Linear.gone")
    assert not upstream.available("torch.nn.Linear.gone")
    assert [r.getMessage() for r in caplog.records] == [
        f"torch {version('torch')} has no torch.nn.Linear.gone, which vhead uses for a test; vhead goes on without it"
    ]


@pytest.mark.parametrize(("since", "until"), [((999,), None), (None, (1,))], ids=["newer", "removed long ago"])
def test_a_name_of_other_releases_is_not_missed(monkeypatch, caplog, since, until):
    monkeypatch.setattr(upstream, "NAMES", (upstream.Name("torch.gone", "a test", since=since, until=until),))
    assert not upstream.available("torch.gone")
    assert not list(upstream.missing_names())
    assert not caplog.records


class TestCache:
    @pytest.mark.parametrize("name", upstream.CACHE_NAMES)
    def test_the_name_is_the_models_own(self, name):
        scope: dict[str, type[nn.Module]] = {}
        exec(f"class Remote(nn.Module):\n    def forward(self, input_ids, {name}=None): ...", {"nn": nn}, scope)
        assert upstream.cache_argument(scope["Remote"]()) == name

    def test_a_model_without_a_cache_has_none(self):
        assert upstream.cache_argument(nn.Linear(2, 2)) is None
        assert upstream.with_cache_as(None, {"past_key_values": 3}) == {"past_key_values": 3}

    def test_transformers_own_models_use_this_releases_name(self):
        assert upstream.cache_argument(model().pretrained_model) == upstream.CACHE

    @pytest.mark.parametrize("name", upstream.CACHE_NAMES)
    def test_a_cache_by_any_name_reaches_the_model(self, name):
        assert upstream.with_cache_as("cache", {name: 3, "use_cache": True}) == {"cache": 3, "use_cache": True}

    def test_none_is_no_cache(self):
        assert upstream.with_cache_as("cache", {"past_key_values": None, "a": 1}) == {"past_key_values": None, "a": 1}

    @pytest.mark.skipif(
        not CONTINUES_FROM_CACHES, reason="this transformers masks what follows a cache with torch >= 2.5"
    )
    @pytest.mark.parametrize("name", upstream.CACHE_NAMES)
    def test_forward_and_values_continue_from_a_cache_by_any_name(self, name):
        critic, tokens = model(), torch.randint(64, (2, 9))
        with torch.no_grad():
            whole = critic(tokens).value
            first = critic(tokens[:, :4], return_past_key_values=True, use_cache=True).past_key_values
            rest = critic(tokens[:, 4:], use_cache=True, **{name: first}).value
        torch.testing.assert_close(rest, whole[:, 4:])

    def test_an_output_without_a_cache_gives_none(self):
        assert upstream.cache_of(ModelOutput(logits=torch.ones(1))) is None


ROLLOUTS = [Rollout([1, 2, 3, 4, 5, 6], completion) for completion in ([7, 8], [9, 10, 11])]


class TestNothingFallsBackInSilence:
    def test_an_interface_that_is_gone_is_said_in_the_log_and_in_the_plan(self, monkeypatch, caplog):
        gone = next(
            name for name in upstream.NAMES if name.path == "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS"
        )
        if not gone.is_expected():
            pytest.skip("this release never had it")
        # Transformers' own layers read it too, so that it cannot really be taken away.
        resolves = upstream._resolves
        monkeypatch.setattr(upstream, "_resolves", lambda path: path != gone.path and resolves(path))
        with caplog.at_level(logging.WARNING):
            plan = Scorer(model()).plan
        (said,) = {record.getMessage() for record in caplog.records}
        assert "has no transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS" in said
        assert "no attention interface" in plan.rejected["tree packing"]
        assert plan.attention != "segments"

    def test_a_strategy_that_raises_is_said_once_with_the_exception(self, monkeypatch, caplog):
        def broken(self, batch):
            raise TypeError("forward() got an unexpected keyword argument 'cache'")

        monkeypatch.setattr(PrefixCache, "states", broken)
        monkeypatch.setattr("vhead.packing.plan._packing", lambda *_: PrefixCache(None))
        with caplog.at_level(logging.WARNING):
            plan = Scorer(model()).plan
            Scorer(model())
        assert plan.strategy == "length-sorted batches"
        assert plan.rejected["prefix cache"] == "TypeError: forward() got an unexpected keyword argument 'cache'"
        assert [record.getMessage() for record in caplog.records] == [
            "LlamaForCausalLM is not scored by prefix cache, which failed when it was tried: "
            "TypeError: forward() got an unexpected keyword argument 'cache'"
        ]

    def test_a_strategy_whose_numbers_differ_is_in_the_plan_and_not_in_the_log(self, monkeypatch, caplog):
        right = PrefixCache.states
        monkeypatch.setattr(PrefixCache, "states", lambda self, batch: right(self, batch).roll(1, dims=0))
        monkeypatch.setattr("vhead.packing.plan._packing", lambda _name, body, _bounds: PrefixCache(body))
        with caplog.at_level(logging.WARNING):
            plan = Scorer(model()).plan
        assert "of the largest state" in plan.rejected["prefix cache"]
        assert not caplog.records

    def test_a_model_of_today_loses_nothing(self, caplog):
        with caplog.at_level(logging.WARNING):
            scorer = Scorer(model())
            scorer.score(ROLLOUTS)
        assert not [record for record in caplog.records if record.name.startswith("vhead")]
        # Before transformers 4.48 there is nothing through which tokens of a tree could attend.
        if upstream.available("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS"):
            assert not scorer.plan.rejected
