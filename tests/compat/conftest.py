"""Interpreters and processes in which some trl, or none, is installed."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.compat import fake_trl
from tests.compat.fake_trl import World, forget_trl, trl_modules
from vhead.compat.trl import uninstall


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Makes a version's layout, or no trl at all, what this process imports under the name; puts everything back."""
    before, meta_path, path = trl_modules(), list(sys.meta_path), os.environ.get("PYTHONPATH")
    forget_trl()

    def enter(version: str | None) -> Path:
        if version is None:
            exec(fake_trl.HIDING, {})
        else:
            fake_trl.write(version, tmp_path)
            monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    yield enter
    uninstall()
    forget_trl()
    sys.meta_path[:] = meta_path
    sys.modules.update(before)
    assert os.environ.get("PYTHONPATH") == path


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a folder of its own where no trl is installed."""
    hiding = tmp_path / "hiding"
    hiding.mkdir()
    (hiding / "sitecustomize.py").write_text(fake_trl.HIDING)

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        everything = {"PYTHONPATH": str(hiding), **environment}
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=inherited | everything,
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )

    return run
