"""Pushing to the hub uploads what saving writes, head included, and leaves the model as it is."""

import pytest
import torch
from packaging.version import Version
from transformers.utils import hub

from tests.library_versions import TRANSFORMERS
from tests.modeling.tiny_models import batch, build
from vhead import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

HEAD_KEYS = {"v_head.summary.weight", "v_head.summary.bias"}


class Card:
    def save(self, path):
        with open(path, "w") as file:
            file.write("card")


class Api:
    """Stands in for the hub: creates every repository, and nothing else."""

    def create_repo(self, repo_id, **_arguments):
        return type("Url", (), {"repo_id": repo_id, "__str__": lambda self: repo_id})()


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """What would be uploaded: a copy of the folder, the repository, and the other arguments."""
    seen = []

    def upload(_self, working_dir, repo_id, _timestamps=None, **arguments):
        import shutil

        copy = tmp_path / f"upload-{len(seen)}"
        shutil.copytree(working_dir, copy)
        seen.append((copy, repo_id, arguments))
        return "url of the commit"

    def card(_repo_id, tags=None, **_arguments):
        seen_tags.append(tags)
        return Card()

    seen_tags = []
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(hub, "create_and_tag_model_card", card)
    monkeypatch.setattr(hub, "hf_api", Api, raising=False)
    monkeypatch.setattr(hub.PushToHubMixin, "_create_repo", lambda self, repo_id, **_: repo_id, raising=False)
    return seen, seen_tags


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["single", "sharded"])
def test_the_head_is_uploaded_with_the_body(uploads, options):
    model = AutoModelForCausalLMWithValueHead(build("llama"))
    names, modules = list(model.pretrained_model.state_dict()), list(model.pretrained_model._modules)
    url = model.push_to_hub("some/model", commit_message="step 5", private=True, **options)
    ((folder, repository, arguments),) = uploads[0]
    assert url == "url of the commit"
    assert repository == "some/model"
    assert arguments["commit_message"] == "step 5"
    assert (folder / "README.md").read_text() == "card"
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert same(loaded, model)
    assert loaded.head_source is not None
    assert list(model.pretrained_model.state_dict()) == names
    assert list(model.pretrained_model._modules) == modules
    assert not hasattr(model.pretrained_model, "v_head")


def test_an_encoder_decoder(uploads):
    model = AutoModelForSeq2SeqLMWithValueHead(build("t5"))
    model.push_to_hub("some/model")
    assert same(AutoModelForSeq2SeqLMWithValueHead.from_pretrained(uploads[0][0][0]), model)


def test_the_head_is_uploaded_with_an_adapter(uploads, tmp_path):
    pytest.importorskip("peft")
    from tests.modeling.adapters_on_disk import lora, peft_is_quiet, save_base, save_reward_adapter

    with peft_is_quiet():
        base = save_base(tmp_path / "base")
        save_reward_adapter(tmp_path / "reward", base)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(
            base, peft_config=lora(), reward_adapter=str(tmp_path / "reward")
        )
        model.push_to_hub("some/adapter")
        folder = uploads[0][0][0]
        assert {"adapter_model.safetensors", "value_head.safetensors", "pytorch_model.bin"} <= {
            path.name for path in folder.iterdir()
        }
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(
            folder, reward_adapter=str(folder / "reward_adapter")
        )
    assert same(loaded, model)
    inputs = batch(build("llama"))
    assert torch.equal(loaded.compute_reward_score(**inputs), model.compute_reward_score(**inputs))


@pytest.mark.parametrize(
    ("given", "expected"), [(None, ["critic"]), ("ppo", ["critic", "ppo"]), (["critic", "x"], ["critic", "x"])]
)
def test_tags_of_the_model_and_of_the_call(uploads, given, expected):
    model = AutoModelForCausalLMWithValueHead(build("llama"))
    model.add_model_tags("critic")
    model.push_to_hub("some/model", **({} if given is None else {"tags": given}))
    assert uploads[1] == [expected]
    assert model.pretrained_model.model_tags == ["critic"]


@pytest.mark.skipif(Version("5") > TRANSFORMERS, reason="this transformers drops unknown arguments")
def test_unknown_arguments_are_transformers_error(uploads):
    with pytest.raises(TypeError):
        AutoModelForCausalLMWithValueHead(build("llama")).push_to_hub("some/model", colour_of_paper=1)
    assert uploads[0] == []


def test_trl_leaves_its_head_in_the_body(uploads):
    """The defect that the first test is about."""
    trl = pytest.importorskip("trl.experimental.ppo", exc_type=ImportError)
    theirs = trl.AutoModelForCausalLMWithValueHead.from_pretrained(build("llama"))
    theirs.push_to_hub("some/model")
    assert hasattr(theirs.pretrained_model, "v_head")
