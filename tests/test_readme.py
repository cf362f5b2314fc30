"""The README and the pages of docs/ do what they say: their Python runs, their commands and their files exist."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]
INDEX = ROOT / "docs" / "README.md"
SCORING = ROOT / "docs" / "scoring-reference.md"


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str, program: str) -> list[list[str]]:
    """The words of every call of a program in the shell blocks, comments cut."""
    lines = [line.split("#")[0] for block in blocks(text, "bash") for line in block.splitlines()]
    return [line.split() for line in lines if line.split()[:1] == [program]]


def broken_links(page: Path) -> list[str]:
    """Relative links and images of a page that lead nowhere."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    return [target for target in targets if "://" not in target and not (page.parent / target).exists()]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_anchors(page: Path) -> list[str]:
    """Links of a page to headings that are not there."""
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text())
    targets = [(page.parent / path if path else page, anchor) for path, anchor in links if "://" not in path]
    return [f"{name(target)}#{anchor}" for target, anchor in targets if anchor not in anchors(target)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


PAGES_WITH_PYTHON = [page for page in PAGES if blocks(page.read_text(), "python")]


def run_blocks(python: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code blocks one after the other in one interpreter, as a reader would."""
    script = folder / "blocks.py"
    script.write_text("\n".join(python))
    return subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, check=False)


@cache
def vhead_help(*words: str) -> str:
    wide = os.environ | {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "vhead", *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=wide).stdout


def unknown_options(words: list[str]) -> list[str]:
    """The options of a call of `vhead` that its help does not name."""
    known = vhead_help(words[1])
    return [word for word in words if word.startswith("--") and not re.search(rf"{word}\b", known)]


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    done = run_blocks(blocks(page.read_text(), "python"), tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_readme_has_python_to_run() -> None:
    assert len(blocks((ROOT / "README.md").read_text(), "python")) >= 4


def test_a_broken_python_block_is_seen(tmp_path: Path) -> None:
    assert run_blocks(["import vhead\n", "vhead.AutoModelForEverything\n"], tmp_path).returncode == 1


@pytest.mark.parametrize(
    "words", [words for page in PAGES for words in commands(page.read_text(), "vhead")], ids=" ".join
)
def test_vhead_commands_exist(words: list[str]) -> None:
    assert unknown_options(words) == []


def test_an_unknown_option_is_seen() -> None:
    assert unknown_options(["vhead", "score", "--model", "--colour-of-paper"]) == ["--colour-of-paper"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert {words[1] for words in commands(page.read_text(), "make")} <= targets


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    assert broken_anchors(page) == []


def test_the_index_of_the_documentation_names_each_page_once() -> None:
    pages = {page.name for page in INDEX.parent.glob("*.md")} - {INDEX.name}
    assert sorted(re.findall(r"^\| \[(.*?\.md)\]", INDEX.read_text(), re.MULTILINE)) == sorted(pages)


def test_the_reference_lists_every_option_of_scoring() -> None:
    options = set(re.findall(r"--[a-z-]+", vhead_help("score"))) - {"--help"}
    assert options >= {"--model", "--resume"}
    assert {option for option in options if f"`{option}`" not in SCORING.read_text()} == set()


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("![chart](docs/none.png) [self](page.md#top) [far](https://example.org/x)")
    assert broken_links(page) == ["docs/none.png"]


def test_a_link_to_a_heading_that_is_gone_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# The `only` one, here\n[self](#the-only-one-here) [gone](page.md#another) [far](https://x.org/#y)"
    )
    assert broken_anchors(page) == ["page.md#another"]


def test_two_commands_are_on_the_first_screen() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:25]
    assert {"demo", "test"} <= {words[1] for words in commands("\n".join(first_screen), "make")}


def unknown_paths(text: str) -> list[str]:
    """Paths in backticks that no tracked file has, or ends in; a folder counts by its files."""
    named = re.findall(r"`([\w./-]+(?:\.(?:py|pyi|rs|cu|md|toml|yml)|/))`", text)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {f"{folder}/" for path in tracked for folder in Path(path).parents}
    known = [f"/{path}" for path in {*tracked, *folders}]
    return [path for path in named if not any(each.endswith(f"/{path}") for each in known)]


def test_paths_that_contributing_names_exist() -> None:
    assert unknown_paths((ROOT / "CONTRIBUTING.md").read_text()) == []


def test_a_path_that_is_gone_is_seen() -> None:
    assert unknown_paths("`rust/core/` `head_weights.py` `gone/nowhere.py`") == ["gone/nowhere.py"]
