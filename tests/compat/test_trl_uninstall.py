"""Uninstalling leaves modules, names, import hooks and the environment as they were."""

import importlib
import os
import sys
import warnings

import pytest

import vhead
from tests.compat import fake_trl
from tests.compat.fake_trl import NAMED, World, imported, load_everything, trl_modules
from vhead.compat.trl import install, status, uninstall


def snapshot() -> dict[str, object]:
    """What an installation can change, in a form that compares by identity."""
    return {
        "modules": {name: id(module) for name, module in trl_modules().items()},
        "names": {
            (name, key): id(value) for name, module in trl_modules().items() for key, value in vars(module).items()
        },
        "meta_path": [id(finder) for finder in sys.meta_path],
        "environment": dict(os.environ),
        "path": list(sys.path),
    }


@pytest.mark.parametrize("version", fake_trl.LAYOUTS)
def test_everything_is_as_before(world: World, version: str) -> None:
    world(version)
    load_everything()
    before = snapshot()
    install()
    load_everything()
    assert snapshot() != before
    uninstall()
    assert snapshot() == before


@pytest.mark.parametrize("version", [*fake_trl.LAYOUTS, None])
def test_unused_it_leaves_no_trace(world: World, version: str | None) -> None:
    world(version)
    before = snapshot()
    install()
    assert snapshot()["modules"] == {}
    uninstall()
    assert snapshot() == before


def test_without_trl_its_modules_are_gone(world: World) -> None:
    world(None)
    install()
    load_everything()
    uninstall()
    assert trl_modules() == {}
    with pytest.raises(ModuleNotFoundError, match="No module named 'trl'"):
        importlib.import_module("trl")


@pytest.mark.parametrize("version", fake_trl.LAYOUTS)
def test_trl_imported_meanwhile_has_its_own_names_again(world: World, version: str) -> None:
    world(version)
    lacking = [pair for pair in NAMED if not has(*pair)]
    for name in trl_modules():
        del sys.modules[name]
    install()
    load_everything()
    uninstall()
    assert [pair for pair in NAMED if not has(*pair)] == lacking
    ours = {id(getattr(vhead, name)) for name in ("ValueHead", "create_reference_model", *CLASSES)}
    held = {(m, k) for m, module in trl_modules().items() for k, value in vars(module).items() if id(value) in ours}
    assert held == set()


CLASSES = (fake_trl.CAUSAL, fake_trl.SEQ2SEQ, fake_trl.WRAPPER)


def has(module: str, name: str) -> bool:
    try:
        value = imported(module, name)
    except (ImportError, AttributeError):
        return False
    values = value if isinstance(value, tuple) else (value,)
    return all(value.__module__.startswith("trl.") and built_on_trl(value) for value in values)


def built_on_trl(value: object) -> bool:
    return all(not base.__module__.startswith("vhead") for base in getattr(value, "__mro__", ()))


def test_a_trainer_imported_meanwhile_takes_trl_s_own_again(world: World) -> None:
    world("0.11.4")
    with install():
        trainer = importlib.import_module("trl.trainer.ppo_trainer")
    own = imported("trl", fake_trl.CAUSAL)
    assert trainer.PPOTrainer(own()).ref_model("m") == ("trl", "m")
    assert (own, imported("trl", fake_trl.SEQ2SEQ)) == trainer.SUPPORTED_ARCHITECTURES


def test_only_the_outermost_of_nested_installations_uninstalls(world: World) -> None:
    world(None)
    with install():
        with install():
            pass
        assert status().installed
        install()
    assert not status().installed
    uninstall()
    assert not status().installed


def test_uninstalling_inside_a_context_is_no_mistake(world: World) -> None:
    world(None)
    with install():
        uninstall()
    assert not status().installed


def test_a_name_that_was_bound_anew_is_left_alone(world: World) -> None:
    world("0.11.4")
    load_everything()
    with install():
        sys.modules["trl"].PreTrainedModelWrapper = int
    assert sys.modules["trl"].PreTrainedModelWrapper is int


def test_an_installation_that_fails_leaves_no_trace(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world("0.11.4")
    load_everything()
    before = snapshot()
    monkeypatch.setattr("vhead.compat.trl.namespaces.value_of", lambda name: {}[name])
    with pytest.raises(KeyError):
        install()
    assert snapshot() == before
    assert not status().installed


@pytest.mark.parametrize("path", [None, "", "/somewhere", f"/somewhere{os.pathsep}/else"])
def test_the_environment_is_restored(world: World, monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    world(None)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    with install():
        entries = os.environ["PYTHONPATH"].split(os.pathsep)
        assert entries[0].endswith("startup")
        assert entries[1:] == (path.split(os.pathsep) if path else [])
        assert status().workers
    assert os.environ.get("PYTHONPATH") == path
    monkeypatch.undo()


def test_what_others_add_to_the_environment_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world(None)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    with install():
        os.environ["PYTHONPATH"] += f"{os.pathsep}/added"
    assert os.environ["PYTHONPATH"] == f"/somewhere{os.pathsep}/added"
    monkeypatch.undo()


def test_workers_can_be_left_out(world: World) -> None:
    world(None)
    before = dict(os.environ)
    install(reach_workers=False)
    assert dict(os.environ) == before
    assert "not reached" in str(status())


def test_warnings_of_trl_do_not_escape_uninstalling(world: World) -> None:
    world("1.12.0")
    install()
    load_everything()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uninstall()
