"""The workspace in which the crate's feature `cuda` is compiled has the versions of the real one."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "tests" / "candle_cuda"


def locked(workspace: Path) -> set[tuple[str, str]]:
    packages = tomllib.loads((workspace / "Cargo.lock").read_text())["package"]
    return {(package["name"], package["version"]) for package in packages}


def test_both_workspaces_lock_the_same_versions():
    assert locked(CHECK) - locked(ROOT) == {("vhead-candle-cuda-check", "0.0.0")}, "cp Cargo.lock tests/candle_cuda"


def test_the_stand_in_has_the_version_of_what_it_stands_in_for():
    stand_in = tomllib.loads((CHECK / "candle-kernels" / "Cargo.toml").read_text())["package"]
    assert (stand_in["name"], stand_in["version"]) in locked(ROOT)
