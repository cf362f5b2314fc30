"""Writes the table of formats into docs/formats.md: `python tools/formats_table.py`. A test holds the two equal."""

import re
from pathlib import Path

from vhead.formats import FORMATS, Format

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
BEGIN, END = "<!-- formats: written by tools/formats_table.py -->\n", "<!-- end of formats -->\n"
HEADER = "| Format | Who writes it | Tensors of the head | Written | Notes |\n|---|---|---|---|---|\n"


def row(head_format: Format) -> str:
    """One format's line of the table."""
    layouts = [re.split(r", (?=[a-z_])", layout) for layout in head_format.expected.split(" or ")]
    tensors = "; or ".join(", ".join(f"`{tensor}`" for tensor in layout) for layout in layouts)
    written = "head" if head_format.body is None else "head, model"
    notes = head_format.notes[:1].upper() + head_format.notes[1:]
    return f"| `{head_format.name}` | {head_format.frameworks} | {tensors} | {written} | {notes} |\n"


def table() -> str:
    """The table of all formats, in the order in which they are tried."""
    return HEADER + "".join(map(row, FORMATS))


def page_with_table(text: str) -> str:
    """The page with the table between its two marks made anew."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def main() -> None:
    """Writes the page with its table made anew."""
    PAGE.write_text(page_with_table(PAGE.read_text()))


if __name__ == "__main__":
    main()
