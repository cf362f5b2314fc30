"""Every path at which trl ever had its value-head names leads to vhead, with any trl and with none."""

import copy
import importlib
import importlib.util
import pickle
import sys
import threading
import warnings

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

import vhead
from tests.compat import fake_trl
from tests.compat.fake_trl import NAMED, World, imported, load_everything
from vhead.compat.trl import install, status
from vhead.compat.trl.names import NAMES

VERSIONS = [*fake_trl.LAYOUTS, None]


def tiny() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11, n_positions=16))


def expected(name: str) -> object:
    both = (vhead.AutoModelForCausalLMWithValueHead, vhead.AutoModelForSeq2SeqLMWithValueHead)
    return both if name == "SUPPORTED_ARCHITECTURES" else getattr(vhead, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_path_leads_to_vhead(world: World, version: str | None) -> None:
    world(version)
    install()
    assert {(module, name): imported(module, name) for module, name in NAMED} == {
        (module, name): expected(name) for module, name in NAMED
    }
    assert status().trl == version
    assert status().overlaid == tuple(sorted(status().overlaid, key=list(NAMES).index))


@pytest.mark.parametrize("version", fake_trl.LAYOUTS)
def test_every_path_leads_to_vhead_when_trl_was_imported_before(world: World, version: str) -> None:
    world(version)
    load_everything()
    install()
    for module, name in NAMED:
        value = imported(module, name)
        assert value == expected(name) or value[:2] == expected(name)


def test_without_installing_the_names_are_trl_s(world: World) -> None:
    world("0.11.4")
    assert imported("trl", fake_trl.CAUSAL).__module__ == "trl.models.modeling_value_head"


@pytest.mark.parametrize("order", [("trl.experimental.ppo", "trl"), ("trl", "trl.experimental.ppo")])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_import_that_verl_tries_succeeds(world: World, version: str | None, order: tuple[str, str]) -> None:
    world(version)
    install()
    assert importlib.util.find_spec("trl") is not None
    for module in order:
        found = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            exec(f"from {module} import {fake_trl.CAUSAL}", found)
        assert found[fake_trl.CAUSAL] is vhead.AutoModelForCausalLMWithValueHead


@pytest.mark.parametrize("late", [False, True])
def test_an_old_trainer_accepts_vhead_s_model(world: World, late: bool) -> None:
    world("0.11.4")
    if late:
        importlib.import_module("trl.trainer.ppo_trainer")
    install()
    trainer = importlib.import_module("trl.trainer.ppo_trainer")
    model = vhead.AutoModelForCausalLMWithValueHead(tiny())
    assert trainer.PPOTrainer(model).ref_model is vhead.create_reference_model
    with pytest.raises(ValueError, match="is not one of"):
        trainer.PPOTrainer(object())


def test_a_trainer_imported_before_still_accepts_trl_s_own(world: World) -> None:
    world("0.11.4")
    trainer = importlib.import_module("trl.trainer.ppo_trainer")
    made_before = imported("trl", fake_trl.CAUSAL)()
    install()
    assert trainer.PPOTrainer(made_before)


def test_classes_imported_by_name_before_are_rebound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world("0.11.4")
    (folder / "their_code.py").write_text(f"from trl import {fake_trl.CAUSAL} as Model\nKINDS = (Model, int)\n")
    theirs = importlib.import_module("their_code")
    monkeypatch.setitem(sys.modules, "their_code", theirs)
    before = theirs.Model
    with install():
        assert theirs.Model is vhead.AutoModelForCausalLMWithValueHead
        assert (vhead.AutoModelForCausalLMWithValueHead, before, int) == theirs.KINDS
        assert "their_code.Model" in status().rebound
    assert theirs.Model is before
    assert (before, int) == theirs.KINDS


def test_a_class_derived_before_is_reported(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world("0.11.4")
    derived = type("Critic", (imported("trl", fake_trl.CAUSAL),), {"__module__": "their_critic"})
    install()
    assert f"{derived.__module__}.Critic was derived from trl's class before install()" in caplog.text


def test_models_are_ordinary_objects(world: World) -> None:
    world("1.16.0")
    install()
    causal, wrapper = imported("trl", fake_trl.CAUSAL), imported("trl", fake_trl.WRAPPER)
    critic = type("Critic", (causal,), {})
    model = causal.from_pretrained(tiny())
    assert isinstance(model, causal)
    assert isinstance(copy.deepcopy(model), imported("trl.experimental.ppo", fake_trl.CAUSAL))
    assert isinstance(critic(tiny()), wrapper)
    assert issubclass(critic, wrapper)
    pickled = pickle.dumps(model)
    assert b"trl.models" not in pickled
    assert type(pickle.loads(pickled)) is causal


def test_what_trl_alone_has_is_still_trl_s(world: World) -> None:
    world("0.11.4")
    install()
    mixture = imported("trl.models", "GeometricMixtureWrapper")
    assert mixture.__module__ == "trl.models.modeling_base"
    with pytest.raises(AttributeError, match="module trl has no attribute SFTTrainer"):
        imported("trl", "SFTTrainer")


def test_a_stand_in_says_what_it_is(world: World) -> None:
    world(None)
    install()
    trl = importlib.import_module("trl")
    with pytest.raises(AttributeError, match=r"no attribute 'PPOTrainer': trl is not installed, and .* stand-in"):
        trl.PPOTrainer
    with pytest.raises(ImportError, match=r"cannot import name 'PPOTrainer' from 'trl' \(.*vhead/.*/stand_in.py"):
        exec("from trl import PPOTrainer", {})
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'trl.trainer'"):
        importlib.import_module("trl.trainer")
    assert importlib.util.find_spec("trl.trainer") is None
    assert not hasattr(trl, "__version__")
    assert dir(trl) == sorted(trl.__all__)
    assert trl.models.modeling_value_head.ValueHead is vhead.ValueHead
    assert "stand-in" in trl.__doc__


def test_the_stand_in_names_the_trl_that_lacks_the_module(world: World) -> None:
    world("1.16.0")
    install()
    with pytest.raises(AttributeError, match=r"no attribute 'PPOTrainer': trl 1\.16\.0 is installed"):
        imported("trl.experimental.ppo", "PPOTrainer")


def test_a_folder_named_trl_is_not_trl(world: World) -> None:
    world(None)
    sys.meta_path.append(NamespaceOf("trl"))
    install()
    assert imported("trl", fake_trl.CAUSAL) is vhead.AutoModelForCausalLMWithValueHead


class NamespaceOf:
    """Finds what Python finds for a folder without `__init__.py`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:
        return importlib.machinery.ModuleSpec(fullname, None, is_package=True) if fullname == self.name else None


def test_trl_s_own_warning_is_seen_once_and_at_its_place(world: World) -> None:
    world("1.12.0")
    install()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exec(compile(f"from trl.experimental.ppo import {fake_trl.CAUSAL}", "their_script.py", "exec"), {})
    assert [(str(warning.message), warning.filename) for warning in seen] == [("experimental", "their_script.py")]


@pytest.mark.parametrize("name", ["trl", "trl.models", "trl.models.utils", "trl.experimental.utils"])
@pytest.mark.parametrize("version", fake_trl.LAYOUTS)
def test_reloading_keeps_the_names(world: World, version: str, name: str) -> None:
    world(version)
    install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        module = importlib.reload(importlib.import_module(name))
    assert module.create_reference_model is vhead.create_reference_model


def test_trl_s_modules_keep_their_loaders(world: World) -> None:
    world("0.11.4")
    install()
    base = importlib.import_module("trl.models.modeling_base")
    assert "GeometricMixtureWrapper" in base.__loader__.get_source(base.__name__)
    assert base.__spec__.loader is base.__loader__


def test_threads_that_import_at_once_agree(world: World) -> None:
    world("0.11.4")
    seen: list[object] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        install()
        seen.append(imported("trl.models.modeling_value_head", fake_trl.CAUSAL))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [vhead.AutoModelForCausalLMWithValueHead] * 8
