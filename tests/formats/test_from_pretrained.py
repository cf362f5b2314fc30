"""A checkpoint of any framework that has a language model gives that framework's values."""

import json
import shutil

import pytest
import torch
import transformers
from packaging.version import Version

from tests.formats.golden import EXPECTED, TOKENS, WITH_BODY, location
from tests.library_versions import READS_PICKLES
from vhead import AutoModelForCausalLMWithValueHead
from vhead.errors import BodyMismatchError
from vhead.formats import load

# Older versions of transformers cannot take a prefix off a checkpoint's names.
RENAMES = Version(transformers.__version__) >= Version("5")


def loaded(path):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(path, torch_dtype=torch.float32)
    with torch.no_grad():
        return model, model.values(TOKENS)


def framework_values(name):
    """Values `[B, T]`, or `[B, T, K]` of several outputs, as the framework's own rule gave them."""
    values = torch.tensor(EXPECTED[name]["values"])
    return values.squeeze(-1) if values.shape[-1] == 1 else values


@pytest.mark.parametrize("name", WITH_BODY)
def test_values_are_the_framework_s(name):
    if not READS_PICKLES and any(location(name).glob("*.bin")):
        pytest.skip("this transformers reads pickles with torch >= 2.6 only")
    if EXPECTED[name]["body_prefix"] and not RENAMES:
        with pytest.raises(BodyMismatchError, match="vhead convert"):
            loaded(location(name))
        return
    model, values = loaded(location(name))
    expected = framework_values(name)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01, "values that are all alike would prove nothing"
    assert f"({EXPECTED[name]['format']})" in model.head_source
    assert not model.training


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_the_output_layer_s_place(tmp_path, tied):
    shutil.copytree(location("verl_megatron"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    model, values = loaded(tmp_path / "model")
    torch.testing.assert_close(values, framework_values("verl_megatron"), rtol=1e-4, atol=1e-5)
    assert model.untrained == {"lm_head.weight"}


@pytest.mark.parametrize("name", ["vhead_outputs", "vhead_two_layers"])
def test_heads_that_trl_has_no_names_for_come_back_from_a_saved_model(tmp_path, name):
    model, values = loaded(location(name))
    model.save_pretrained(tmp_path)
    again, values_again = loaded(tmp_path)
    assert torch.equal(values, values_again)
    assert type(again.v_head.summary) is type(model.v_head.summary)
    assert load(tmp_path).format == "vhead"
