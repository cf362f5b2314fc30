"""Folders of models, mutated: a folder scores, or one line of vhead's says what is wrong with it."""

import random
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

import vhead.modeling.loading
import vhead.scoring.loading
import vhead.scoring.scorer
from tests.attack.mutations import mutate_file
from tests.attack.scale import scaled
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.errors import VheadError

COUNT = scaled(short=20, long=300)
COMMON = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "llama": {**COMMON, **SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64},
    "gpt2": {**COMMON, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mistral": {**COMMON, **SIZES, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64},
}


@pytest.fixture(params=MODELS)
def golden(request, tmp_path):
    config = AutoConfig.for_model(request.param, **MODELS[request.param])
    body = AutoModelForCausalLM.from_config(config).eval()
    AutoModelForCausalLMWithValueHead(body).save_pretrained(tmp_path / "golden")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "golden")
    return tmp_path / "golden"


def attack(golden, folder, count):
    """The errors that are not vhead's, and how many folders scored."""
    random_ = random.Random(count)
    offences, scored = [], 0
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(golden, folder)
        files = sorted(folder.iterdir())
        mutate_file(random_.choice([*files, folder / "config.json", folder / "config.json"]), random_)
        try:
            scores = Scorer.from_pretrained(folder, device="cpu").score([Rollout([5, 6], [7, 8, 9])])
            scored += np.isfinite(scores.values).all()
        except VheadError as error:
            assert "\n" not in str(error)  # noqa: PT017, every one of them is one line
        except Exception as error:
            offences.append(error)
    return offences, scored


@pytest.mark.filterwarnings("ignore")
def test_mutated_folders_end_in_errors_of_vhead_s_only(golden, tmp_path):
    torch.set_num_threads(1)
    offences, scored = attack(golden, tmp_path / "x", COUNT)
    assert offences == []
    assert 0 < scored < COUNT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_the_attack_finds_an_error_of_another_package(golden, tmp_path, monkeypatch):
    """The control: without the gate, other packages' errors come through."""
    for module in (vhead.modeling.loading, vhead.scoring.loading, vhead.scoring.scorer):
        monkeypatch.setattr(module, "loading", lambda _: nullcontext())
    offences, _ = attack(golden, tmp_path / "x", COUNT)
    assert offences
