"""The page about formats says what the code does."""

import importlib.util
from pathlib import Path

from vhead.formats import FORMATS

ROOT = Path(__file__).parent.parent.parent


def tool():
    spec = importlib.util.spec_from_file_location("formats_table", ROOT / "tools" / "formats_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_one_that_the_formats_give():
    formats_table = tool()
    page = formats_table.PAGE.read_text()
    assert page == formats_table.page_with_table(page)
    assert all(f"| `{head_format.name}` |" in page for head_format in FORMATS)


def test_another_table_would_be_noticed():
    formats_table = tool()
    page = formats_table.PAGE.read_text()
    changed = page.replace("| `nemo` |", "| `memo` |")
    assert changed != page
    assert formats_table.page_with_table(changed) == page
