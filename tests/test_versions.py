"""The lowest releases that the package asks for are those of the oldest world, and its sources name nothing newer."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.requirement_files import read_pins
from tools.versions import names
from vhead import upstream

ROOT = Path(__file__).parent.parent
WORLDS = ROOT / "tools" / "versions"
PINS = {path.stem: path for path in WORLDS.glob("*.txt")} | {"locked": ROOT / "requirements" / "test.txt"}


# Names that only newer releases have, each reached where its absence is answered for.
NEWER = {name.path for name in upstream.NAMES if name.since}


def pins(world: str) -> dict[str, str]:
    """Package and release of every line of a world, by the names of pyproject.toml."""
    releases = {pin.name: pin.release for pin in read_pins(PINS[world].read_text())}
    wanted = [requirement.name for requirement in requirements()]
    return releases | {name: releases[canonicalize_name(name)] for name in wanted}


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
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators <= {">=", "!="}, "an upper bound would move somebody's release"


def test_every_world_is_whole():
    assert sorted(PINS) == ["locked", "middle", "oldest"]
    for world in PINS:
        assert all(pins(world)[requirement.name] for requirement in requirements())
    assert pins("oldest")["numpy"].startswith("1.")
    assert pins("locked")["numpy"].startswith("2.")


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


@pytest.mark.parametrize("world", PINS)
def test_the_page_states_each_world_s_releases(world):
    link = f"[{world}](../{PINS[world].relative_to(ROOT)})"
    row = "| {link} | {torch} | {transformers} | {numpy} |".format(link=link, **pins(world))
    assert row in (ROOT / "docs" / "versions.md").read_text()


def test_the_page_states_the_range():
    page = (ROOT / "docs" / "versions.md").read_text()
    for requirement in requirements()[:5]:
        (bound,) = lowest(requirement.specifier)
        assert f"| {requirement.name} | {bound} | {'.'.join(pins('locked')[requirement.name].split('.')[:2])} |" in page


def test_the_page_states_the_last_run_of_each_world():
    runs = [json.loads(line) for line in (WORLDS / "results.jsonl").read_text().splitlines()]
    page = (ROOT / "docs" / "versions.md").read_text()
    for run in {run["world"]: run for run in runs}.values():
        counts = " | ".join(str(run.get(kind, 0)) for kind in ("passed", "failed", "skipped"))
        assert f"| {run['world']} | {run['commit']} | {counts} |" in page
