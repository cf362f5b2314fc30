"""Weights that change under a server, and several models in one."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import typer

from tests.serve.conftest import PATIENCE_S, RunningServer
from vhead import Rollout, Scorer, formats
from vhead.cli.serve import _follow, _others
from vhead.demo import demo_model_path
from vhead.errors import RequestError
from vhead.heads import ValueHead
from vhead.serve.operations import _is_loopback
from vhead.serve.weights import Weights
from vhead.sync import Publisher

BODY = {"rollouts": [{"prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 10, 11]}], "returns": ["values", "reward"]}
ROLLOUT = Rollout([5, 6, 7], [8, 9, 10, 11])


class Trainer:
    """Publishes weights with another head at each step, and knows the rewards that they give."""

    def __init__(self, directory) -> None:
        self.directory = directory
        self.scorer = Scorer.from_pretrained(demo_model_path(), device="cpu", batch_invariant=True)
        self.publisher = Publisher(directory)
        self.rewards = {None: self._reward()}
        self.digests: dict[int, str] = {}

    def publish(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for weight in self.scorer.model.v_head.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        self.digests[step] = self.publisher.publish(self.scorer.model, step=step).digest
        self.rewards[step] = self._reward()

    def damage(self, step: int) -> None:
        file = self.directory / f"step-{step:08}" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.chmod(0o644)
        file.write_bytes(content)

    def _reward(self) -> np.float32:
        return np.float32(self.scorer.score([ROLLOUT], ["reward"]).reward[0])


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def other_head(tmp_path_factory, scorer):
    head = ValueHead(scorer.model.config, num_outputs=2, v_head_init_strategy="normal").eval()
    file = tmp_path_factory.mktemp("head") / "v_head.safetensors"
    formats.save(head.weights(), file, format="vhead")
    return head, file


@pytest.fixture(scope="module")
def following(tmp_path_factory, trainer, other_head):
    running = RunningServer(
        tmp_path_factory.mktemp("serve") / "log", "--served-model-name", "demo", "--batch-invariant",
        "--follow", str(trainer.directory), "--model", f"other={other_head[1]}",
        "--model", f"plain={demo_model_path()}",
    )  # fmt: skip
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log.read_text()


def scored(server, step, trainer):
    answer = server.post("/score", BODY).json
    assert answer["step"] == step
    assert np.float32(answer["scores"][0]["reward"]) == trainer.rewards[step]
    assert answer["scores"][0]["weights_step"] == (-1 if step is None else step)


def test_weights_are_followed_refused_and_taken_back(following, trainer):
    scored(following, None, trainer)
    about = following.ask("GET", "/weights").json
    assert (about["digest"], "nothing has been published" in about["problem"]) == (None, True)
    assert following.log.read_text().count("nothing has been published there yet") == 1

    trainer.publish(10)
    until = time.monotonic() + PATIENCE_S
    # A server without requests looks too.
    while (about := following.ask("GET", "/weights").json)["step"] is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert (about["step"], about["digest"], about["published_steps"]) == (10, trainer.digests[10], [10])
    scored(following, 10, trainer)
    for path, body in (("/classify", {"input": [5, 6, 7]}), ("/get_reward", {"query": [[5, 6, 7]]})):
        assert following.post(path, body).json["step"] == 10

    trainer.publish(20)
    assert following.post("/reload", {}).json["step"] == 20
    scored(following, 20, trainer)
    assert following.post("/weights/rollback", {}).json["pinned"] is True
    for _ in range(2):
        scored(following, 10, trainer)
    missing = following.post("/weights/rollback", {"step": 15})
    assert (missing.status, "expected one of the published steps 10, 20, got 15" in missing.message) == (404, True)
    scored(following, 10, trainer)
    assert following.ask("POST", "/reload").json["step"] == 20
    assert b'vhead_weights_step{model="demo"} 20.0' in following.ask("GET", "/metrics").body


def test_a_directory_that_is_not_there_yet_is_said_once_and_followed_later(tmp_path, caplog):
    directory = tmp_path / "later"
    model = Scorer.from_pretrained(demo_model_path(), device="cpu").model
    weights = Weights(model, directory=directory)
    for _ in range(3):
        weights.refresh()
    warned = [record.message for record in caplog.records if record.name == "vhead.serve"]
    assert len(warned) == 1
    assert warned[0].startswith(f"{directory}: nothing has been published there yet")
    problem = weights.about()["problem"]
    assert "nothing has been published" in problem
    assert str(directory) not in problem

    Publisher(directory).publish(model, step=7)
    weights.refresh()
    assert (weights.step, weights.about()["problem"]) == (7, None)


def test_a_directory_that_is_gone_is_called_one_to_clients_and_not_by_its_path(tmp_path):
    directory = tmp_path / "gone"
    model = Scorer.from_pretrained(demo_model_path(), device="cpu").model
    with pytest.raises(RequestError, match=r"as they were: the directory: is not there") as refused:
        Weights(model, directory=directory).roll_back()
    assert str(tmp_path) not in str(refused.value)


def test_a_bad_publication_leaves_the_old_weights_and_says_so(following, trainer):
    before = following.ask("GET", "/weights").json["step"]
    trainer.publisher = Publisher(trainer.directory)
    if before is None:
        trainer.publish(20)
        before = following.post("/reload", {}).json["step"]
    following.post("/weights/rollback", {"step": before})
    trainer.publish(30)
    trainer.damage(30)
    refused = following.post("/reload", {})
    assert (refused.status, "got other bytes" in refused.message) == (409, True)
    assert str(trainer.directory) not in refused.message
    scored(following, before, trainer)
    about = following.ask("GET", "/weights").json
    assert (about["step"], "step-00000030" in about["problem"]) == (before, True)
    warnings = [line for line in following.lines() if f"the weights of step {before} are served on" in line["message"]]
    assert len(warnings) == 1
    trainer.publish(40)
    assert following.post("/reload", {}).json["problem"] is None
    scored(following, 40, trainer)


def test_a_request_chooses_its_model(following, trainer, other_head, scorer):
    expected = scorer.with_head(other_head[0]).score([ROLLOUT], ["reward"]).reward[0]
    following.post("/reload", {})
    step = following.ask("GET", "/weights").json["step"]
    answer = following.post("/score", {**BODY, "model": "other"}).json
    assert (answer["model"], answer["step"]) == ("other", step)
    assert np.array_equal(np.array(answer["scores"][0]["reward"], np.float32), expected)
    plain = following.post("/score", {**BODY, "model": "plain"}).json
    assert (plain["model"], plain["step"]) == ("plain", None)
    assert np.float32(plain["scores"][0]["reward"]) == trainer.rewards[None]
    probs = following.post("/classify", {"model": "other", "input": [5, 6, 7]}).json
    assert (probs["model"], len(probs["data"][0]["probs"])) == ("other", 2)
    names = [entry["id"] for entry in following.ask("GET", "/v1/models").json["data"]]
    assert names == ["demo", "other", "plain"]
    for path, body in (("/score", BODY), ("/tokenize", {"prompt": "a"}), ("/reload", {}), ("/weights/rollback", {})):
        unknown = following.post(path, {**body, "model": "../plain"})
        assert (unknown.status, "expected one of demo, other, plain" in unknown.message) == (404, True)
    assert following.ask("GET", "/weights?model=nobody").status == 404
    refused = following.post("/reload", {"model": "plain"})
    assert (refused.status, "follows no directory" in refused.message) == (409, True)


def test_requests_for_different_models_at_once_get_their_own_answers(following):
    names = ["demo", "other", "plain"]
    alone = {name: following.post("/score", {**BODY, "model": name}).json["scores"] for name in names}
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda name: following.post("/score", {**BODY, "model": name}).json, names * 6))
    for name, answer in zip(names * 6, answers, strict=True):
        assert (answer["model"], answer["scores"]) == (name, alone[name])


def test_a_page_cannot_change_weights(following):
    refused = following.post("/reload", {}, Origin="http://evil.example")
    assert (refused.status, "not by a page" in refused.message) == (403, True)


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("::1", True), ("10.0.0.1", False), ("", False)])
def test_who_is_on_this_machine(host, expected):
    assert _is_loopback(host) == expected


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"other_models": ["nameless"]}, "--model"),
        ({"other_models": ["a=x", "a=y"]}, "--model"),
        ({"other_models": ["demo=x"]}, "--model"),
        ({"follow": ["x", "y"]}, "--follow"),
        ({"other_models": ["a=x"], "follow": ["a=1", "a=2"]}, "--follow"),
    ],
)
def test_bad_names_and_directories_are_usage_errors(given, field):
    given = {"other_models": None, "follow": None, **given}
    read = _follow if field == "--follow" else partial(_others, names=["demo"])
    with pytest.raises(typer.BadParameter) as error:
        read(given)
    assert error.value.param_hint == field


@pytest.mark.parametrize("path", ["missing.safetensors", "./missing", "runs/critics/missing", "missing/v_head.bin"])
def test_a_path_with_nothing_there_is_said_before_a_model_is_loaded(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected = f"safety: expected a head's file, a model's folder or a hub id, but there is nothing at {path}"
    with pytest.raises(typer.BadParameter, match=re.escape(expected)) as error:
        _others({"other_models": [f"safety={path}"]}, names=["demo"])
    assert error.value.param_hint == "--model"


def test_what_is_there_and_what_may_be_on_the_hub_are_taken(tmp_path):
    (tmp_path / "v_head.safetensors").touch()
    paths = {"head": str(tmp_path / "v_head.safetensors"), "model": str(tmp_path), "hub": "owner/name", "old": "gpt2"}
    given = {"other_models": [f"{name}={path}" for name, path in paths.items()]}
    assert _others(given, names=["demo"]) == paths


def test_a_directory_belongs_to_the_model_that_it_names():
    given = {"other_models": ["a=x"], "follow": ["a=1", "b=2"]}
    assert _follow(given) == {"a": "1", "": "b=2"}
