"""The bundled model: its files, that it loads in every way, and that its head is trained."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.library_versions import DTYPE
from vhead import AutoModelForCausalLMWithValueHead, Scorer
from vhead.demo import demo_model_path, demo_rollouts_path
from vhead.demo.judgement import Judged, summarise
from vhead.demo.rollouts import IN_THE_MIDDLE, NATURAL, TO_THE_END

# What the head reaches on the bundled rollouts is in PROVENANCE.json's order of size; random heads stay below.
REWARD_AUC = 0.95
TOKEN_AUC = 0.9
SIZE_LIMIT = 2_000_000


def hashes(folder: Path) -> dict[str, str]:
    described = {"PROVENANCE.json", "README.md"}
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name not in described}


def test_the_files_are_those_of_the_provenance(tmp_path: Path) -> None:
    facts = json.loads((demo_model_path() / "PROVENANCE.json").read_text())
    assert hashes(demo_model_path()) == facts["files_sha256"]
    copied = Path(shutil.copytree(demo_model_path(), tmp_path / "model"))
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert hashes(copied) != facts["files_sha256"]


def test_transformers_4_can_load_the_tokenizer() -> None:
    """An empty list of extra tokens, which transformers 5 writes, stops releases 4.46 to 4.57."""
    settings = json.loads((demo_model_path() / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in settings
    assert AutoTokenizer.from_pretrained(demo_model_path())("ab")["input_ids"] == [100, 101, 1]


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in demo_model_path().iterdir()) <= SIZE_LIMIT


def test_the_licence_of_the_text_travels_with_it() -> None:
    assert (
        "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (demo_rollouts_path().parent / "LICENSE-PSF.txt").read_text()
    )
    assert "Python Software Foundation" in (demo_model_path() / "README.md").read_text()


def test_it_loads_as_a_plain_language_model() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), **{DTYPE: torch.bfloat16})
    assert model.dtype == torch.bfloat16
    text = "naïve → Zürich"
    ids = AutoTokenizer.from_pretrained(demo_model_path())(text, add_special_tokens=False).input_ids
    assert [i - 3 for i in ids] == list(text.encode())


def test_its_head_is_the_one_in_the_file() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path())
    tensors = load_file(demo_model_path() / "model.safetensors")
    for name in ("weight", "bias"):
        assert torch.equal(getattr(model.v_head.summary, name), tensors[f"v_head.summary.{name}"])
        assert getattr(model.v_head.summary, name).dtype == torch.float32


def test_the_file_is_what_save_pretrained_writes(tmp_path: Path) -> None:
    AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path(), **{DTYPE: torch.bfloat16}).save_pretrained(
        tmp_path
    )
    shipped = load_file(demo_model_path() / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert shipped.keys() == saved.keys()
    assert all(shipped[name].dtype == saved[name].dtype and torch.equal(shipped[name], saved[name]) for name in shipped)


def test_the_head_tells_natural_from_corrupted_text(judged: list[Judged]) -> None:
    summary = summarise(judged)
    assert summary.auc >= REWARD_AUC
    assert summary.token_auc >= TOKEN_AUC
    assert summary.ordered >= summary.pairs - 1
    assert summary.recovered > 0 > summary.corrupted


@pytest.mark.parametrize("seed", range(3))
def test_random_heads_do_not(judge_all: Callable[[Scorer], list[Judged]], scorer: Scorer, seed: int) -> None:
    model = copy.deepcopy(scorer.model)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.2)
    summary = summarise(judge_all(Scorer(model, AutoTokenizer.from_pretrained(demo_model_path()))))
    assert summary.token_auc < TOKEN_AUC


def test_values_fall_in_the_corrupted_span_and_recover(judged: list[Judged]) -> None:
    middle = [j for j in judged if j.rollout.extent == IN_THE_MIDDLE]
    falls = [j for j in middle if j.values[slice(*j.rollout.span)].mean() < j.values[: j.rollout.span[0]].mean()]
    recovers = [j for j in middle if j.values[-8:].mean() > j.values[slice(*j.rollout.span)].mean()]
    # Repeated and shuffled words are natural words: there the head needs longer than the rest of the line to recover.
    assert len(falls) >= len(middle) - 1
    assert len(recovers) >= len(middle) - 2


def test_natural_text_costs_fewer_bits(judged: list[Judged]) -> None:
    bits = {(j.rollout.topic, j.rollout.extent): j.bits_per_byte for j in judged}
    topics = {topic for topic, _ in bits}
    assert all(bits[topic, NATURAL] < bits[topic, TO_THE_END] for topic in topics)
