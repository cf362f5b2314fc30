"""The additions that CONTRIBUTING describes, each tried with a toy: a head kind, a head format and a command.

A backend is compiled, so there is no toy of it: what is held is that only the files that CONTRIBUTING names know one by
its name.
"""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from tests.typer_runner import RUNNER
from vhead import Rollout, Scorer, ValueHead, formats
from vhead.cli.app import COMMANDS, app_of
from vhead.cli.terminal import show
from vhead.errors import HeadError, HeadMismatchError, HeadNotFoundError
from vhead.formats import registry
from vhead.formats.layout import Format, LinearNames, sightings
from vhead.formats.trl import VHEAD
from vhead.head_weights import HeadWeights, LinearWeights
from vhead.heads import HEAD_KINDS, HeadKind, head_for, kinds
from vhead.modeling import AutoModelForCausalLMWithValueHead

H, FIRST, SECOND = 16, 8, 4
TOY_NAMES = (LinearNames("critic_tower.weight", "critic_tower.bias"),)


def drawn(*sizes):
    """A trained head with projections between these sizes."""
    layers = tuple(LinearWeights(torch.randn(b, a), torch.randn(b)) for a, b in pairwise(sizes))
    return HeadWeights(layers, format="toy", source="a test")


def same(one, other):
    pairs = zip(one.layers, other.layers, strict=True)
    return all(torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) for a, b in pairs)


def three_linears(sizes):
    linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(linears[0], nn.Tanh(), linears[1], nn.Tanh(), linears[2])


def three_layer_values(hidden, summary, dropout_p):
    return summary(nn.functional.dropout(hidden.float(), dropout_p))


TOY_KIND = HeadKind(
    name="three_layer",
    places=("0", "2", "4"),
    build=three_linears,
    is_plain=lambda module: type(module) is nn.Sequential and len(module) == 5,
    values=three_layer_values,
)

TOY_LAYERS = tuple(LinearNames(f"summary.{place}.weight", f"summary.{place}.bias") for place in TOY_KIND.places)


def find_three_layers(checkpoint):
    """What `_find_vhead` finds, with its two projections only where there is no third."""
    found = sightings(checkpoint, "v_head", TOY_LAYERS, "{root}.summary holds three projections", anywhere=True)
    three = [sighting for sighting in found if sighting.layers[2].weight in sighting.found]
    yield from three or VHEAD.find(checkpoint)


@pytest.fixture
def own_format(monkeypatch):
    """The format of this package, with the toy kind's names among its layouts."""
    layouts = (*VHEAD.layouts, tuple(names.below("v_head") for names in TOY_LAYERS))
    extended = replace(VHEAD, find=find_three_layers, layouts=layouts)
    monkeypatch.setattr(registry, "FORMATS", tuple(extended if f is VHEAD else f for f in registry.FORMATS))


class TestHeadKind:
    def config(self):
        return LlamaConfig(
            hidden_size=H, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
        )

    def test_one_entry_of_the_table_is_enough(self, monkeypatch):
        monkeypatch.setattr(kinds, "HEAD_KINDS", [*HEAD_KINDS, TOY_KIND])
        weights = drawn(H, FIRST, SECOND, 1)
        assert head_for(weights) is TOY_KIND
        head = ValueHead.like(weights, self.config(), summary_dropout_prob=0.0)
        hidden = torch.randn(3, 5, H)
        first, second, third = weights.layers
        expected = torch.tanh(hidden @ first.weight.T + first.bias) @ second.weight.T + second.bias
        expected = torch.tanh(expected) @ third.weight.T + third.bias
        assert torch.allclose(head(hidden), expected, atol=1e-5)
        assert head.kind is TOY_KIND
        assert head.weights().sizes == [H, FIRST, SECOND, 1]

    def test_a_model_and_a_scorer_take_it(self, monkeypatch):
        from transformers import LlamaForCausalLM

        monkeypatch.setattr(kinds, "HEAD_KINDS", [*HEAD_KINDS, TOY_KIND])
        model = AutoModelForCausalLMWithValueHead(LlamaForCausalLM(self.config())).eval()
        model.v_head = ValueHead.like(drawn(H, FIRST, SECOND, 1), self.config())
        model.eval()
        score = Scorer(model).score([Rollout([1, 2], [3, 4, 5])])[0]
        expected = model(torch.tensor([[1, 2, 3, 4, 5]])).value[0, 1:-1].detach()
        assert torch.allclose(torch.from_numpy(score.values), expected, atol=1e-4)

    @pytest.mark.usefixtures("own_format")
    def test_its_names_in_the_layouts_are_enough_to_save_and_load_it(self, monkeypatch, tmp_path):
        from transformers import LlamaForCausalLM

        monkeypatch.setattr(kinds, "HEAD_KINDS", [*HEAD_KINDS, TOY_KIND])
        weights = drawn(H, FIRST, SECOND, 1)
        formats.save(weights, tmp_path / "head.safetensors", format="vhead")
        assert same(formats.load(tmp_path / "head.safetensors"), weights)
        model = AutoModelForCausalLMWithValueHead(LlamaForCausalLM(self.config()))
        model.v_head = ValueHead.like(weights, self.config())
        model.save_pretrained(tmp_path / "critic")
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "critic")
        assert loaded.v_head.kind is TOY_KIND
        assert same(loaded.v_head.weights(), weights)

    def test_without_its_names_it_is_neither_saved_nor_loaded(self, tmp_path):
        weights = drawn(H, FIRST, SECOND, 1)
        with pytest.raises(HeadError, match="vhead cannot hold a head of 3 projections"):
            formats.save(weights, tmp_path / "head.safetensors", format="vhead")
        tensors = {
            f"v_head.summary.{place}.{name}": getattr(layer, name)
            for place, layer in zip(TOY_KIND.places, weights.layers, strict=True)
            for name in ("weight", "bias")
        }
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(HeadMismatchError, match=r"v_head\.summary\.4\.weight"):
            formats.load(tmp_path)

    def test_without_the_entry_it_is_refused_with_those_there_are(self):
        with pytest.raises(HeadError, match=r"a test: .* value_head \(1\), two_layer \(2\), found 3"):
            head_for(drawn(H, FIRST, SECOND, 1))


TOY_FORMAT = Format(
    name="toy",
    frameworks="a test",
    find=lambda checkpoint: sightings(
        checkpoint, "critic_tower", (LinearNames("weight", "bias"),), "{root} is what the toy calls its head"
    ),
    layouts=(TOY_NAMES,),
)


class TestFormat:
    @pytest.fixture
    def folder(self, tmp_path):
        head = drawn(H, 1).layers[0]
        save_file({"critic_tower.weight": head.weight, "critic_tower.bias": head.bias}, tmp_path / "model.safetensors")
        return tmp_path, head

    def test_one_entry_of_the_table_is_enough(self, monkeypatch, folder):
        path, head = folder
        monkeypatch.setattr(registry, "FORMATS", (*registry.FORMATS, TOY_FORMAT))
        assert formats.detect(path).format == "toy"
        loaded = formats.load(path)
        assert torch.equal(loaded.weight, head.weight)
        formats.save(loaded, path / "copy.safetensors", format="toy")
        assert torch.equal(formats.load(path / "copy.safetensors").bias, head.bias)
        done = RUNNER.invoke(
            app_of(COMMANDS), ["convert", str(path), str(path / "own.safetensors"), "--format", "vhead"]
        )
        assert done.exit_code == 0, done.stderr
        assert torch.equal(formats.load(path / "own.safetensors").weight, head.weight)

    def test_without_the_entry_the_head_is_not_found(self, folder):
        with pytest.raises((HeadNotFoundError, HeadMismatchError)):
            formats.load(folder[0])


def count(source: str) -> None:
    """Count the characters of a text."""
    show(str(len(source)))


class TestCommand:
    def test_one_entry_of_the_table_is_enough(self):
        app = app_of(COMMANDS | {"count": count})
        assert RUNNER.invoke(app, ["count", "four"]).output == "4\n"
        assert "Count the characters of a text." in RUNNER.invoke(app, ["--help"]).output

    def test_without_the_entry_there_is_no_such_command(self):
        done = RUNNER.invoke(app_of(COMMANDS), ["count", "four"])
        assert done.exit_code == 2
        assert "count" in done.stderr


ROOT = Path(__file__).parents[1]
# A backend's own files, what measures and reports, and candle's devices, which are not torch's.
WITHOUT_BACKENDS = {
    ROOT / "rust" / "python" / "src": ("cuda.rs", "cuda/", "candle.rs"),
    ROOT / "python" / "vhead": ("benchmark/", "cli/", "candle.py"),
}
BY_NAME = re.compile(
    r"""^(?!\s*(//|\#)).*((?<!`)["']cuda["']|\bis_cuda\b|\bCuda\b|\b(crate|super)::cuda\b)""", re.MULTILINE
)


def knowing_backends(files):
    """Which of the files, by name, know a backend by its name."""
    return {name for name, text in files.items() if BY_NAME.search(text)}


def sources():
    """The text of each file that is no backend's own, by its name."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for folder, without in WITHOUT_BACKENDS.items()
        for path in folder.rglob("*.*")
        if path.suffix in {".rs", ".py"} and not str(path.relative_to(folder)).startswith(without)
    }


class TestBackend:
    def test_only_files_that_contributing_names_know_one_by_its_name(self):
        text = (ROOT / "CONTRIBUTING.md").read_text()
        paragraph = text[text.index("- **A backend**") : text.index("- **An operation**")]
        known = knowing_backends(sources())
        assert {"backends.rs", "packing/plan.py"} <= known
        assert [name for name in sorted(known) if f"{Path(name).name}`" not in paragraph] == []

    @pytest.mark.parametrize(
        "line",
        ['    if device == "cuda" {', "        Box::new(crate::cuda::Cuda)", "    return hidden.is_cuda and fast"],
    )
    def test_one_more_place_is_found(self, line):
        text = sources()["gate.rs"]
        assert knowing_backends({"before": text, "after": f"{text}\n{line}\n"}) == {"after"}
