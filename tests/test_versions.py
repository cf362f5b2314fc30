"""The lowest releases that the package asks for are those of the oldest world, and its sources name nothing newer."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vhead import upstream

ROOT = Path(__file__).parent.parent
WORLDS = ROOT / "tools" / "versions"

sys.path.append(str(WORLDS))
import names  # noqa: E402

# Names that only newer releases have, each reached where its absence is answered for.
NEWER = {name.path for name in upstream.NAMES if name.since}


def pins(world: str) -> dict[str, str]:
    """Package and release of every line of a world."""
    lines = (WORLDS / f"{world}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    """What a user of the package, its command line and its Parquet files must have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line) for line in (*project["dependencies"], *extras["cli"], *extras["data"])]


def lowest(specifiers: SpecifierSet) -> list[str]:
    return [specifier.version for specifier in specifiers if specifier.operator == ">="]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_the_oldest_world_has_the_lowest_release_that_is_asked_for(requirement):
    pinned = pins("oldest")[requirement.name]
    (bound,) = lowest(requirement.specifier)
    assert (pinned + ".").startswith(bound + ".")
    assert len(requirement.specifier) == 1, "an upper bound would move somebody's release"


def test_every_world_is_whole():
    worlds = [path.stem for path in WORLDS.glob("*.txt")]
    assert sorted(worlds) == ["middle", "newest", "oldest"]
    for world in worlds:
        assert {requirement.name for requirement in requirements()} <= set(pins(world))
    assert pins("oldest")["numpy"].startswith("1.")
    assert pins("newest")["numpy"].startswith("2.")


def test_the_sources_use_nothing_that_the_oldest_releases_lack():
    recorded = set(json.loads(names.RECORD.read_text()))
    assert names.names_in_package() - recorded - NEWER == set(), "run tools/versions/names.py in the oldest world"


def test_the_check_of_names_can_fail():
    imports = "import torch\nfrom torch import nn\nimport numpy as np\n"
    source = f"{imports}nn.RMSNorm\nnp.linalg.norm\ntorch.nn.Linear.x()\nself.y.z"
    used = set(names.names_in(source))
    assert {"torch", "torch.nn", "torch.nn.RMSNorm", "numpy.linalg.norm", "torch.nn.Linear.x"} <= used
    assert not any(re.search(r"\b[yz]$", name) for name in used)
    assert names.exists("torch.nn.Linear")
    assert not names.exists("torch.nn.ColourOfPaper")
    assert not names.exists("torch.no_such_module.name")


@pytest.mark.parametrize("world", ["oldest", "middle", "newest"])
def test_the_page_states_each_world_s_releases(world):
    row = f"| [{world}](../tools/versions/{world}.txt) | {{torch}} | {{transformers}} | {{numpy}} |".format(
        **pins(world)
    )
    assert row in (ROOT / "docs" / "versions.md").read_text()


def test_the_page_states_the_range():
    page = (ROOT / "docs" / "versions.md").read_text()
    for requirement in requirements()[:5]:
        (bound,) = lowest(requirement.specifier)
        assert f"| {requirement.name} | {bound} | {'.'.join(pins('newest')[requirement.name].split('.')[:2])} |" in page


def test_the_page_states_the_last_run_of_each_world():
    runs = [json.loads(line) for line in (WORLDS / "results.jsonl").read_text().splitlines()]
    page = (ROOT / "docs" / "versions.md").read_text()
    for run in {run["world"]: run for run in runs}.values():
        counts = " | ".join(str(run.get(kind, 0)) for kind in ("passed", "failed", "skipped"))
        assert f"| {run['world']} | {run['commit']} | {counts} |" in page
