"""The page about the hand-over states promises, each with the test that holds it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "sync.md"


def named(page):
    """The names in the last column of the table of promises; None for a promise that names no test."""
    table = page.split("| promise | test |")[1].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        promise, tests = row.strip("|").rsplit("|", 1)
        found = re.findall(r"`(\w+)`", tests)
        yield from found or [f"no test of: {promise}"]


def there():
    """Tests in Python, checks that run in two processes, and tests in Rust."""
    folders = (TESTS / folder for folder in ("attack", "cli", "scoring", "sync"))
    text = "\n".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
    rust = "\n".join(path.read_text() for path in (ROOT / "rust" / "sync").rglob("*.rs"))
    return {*re.findall(r"^def ((?:test|check)_\w+)\(", text, re.MULTILINE), *re.findall(r"#\[test\]\s+fn (\w+)", rust)}


def test_each_promise_names_tests_that_are_there():
    names, known = [*named(PAGE.read_text())], there()
    assert len(names) > 25
    assert [name for name in names if name not in known] == []


def test_the_check_finds_a_test_that_is_not_there():
    page = "| promise | test |\n|---|---|\n| a | `test_of_nothing` |\n| b | later |\n\n"
    assert [*named(page)] == ["test_of_nothing", "no test of:  b "]
    assert "test_of_nothing" not in there()
