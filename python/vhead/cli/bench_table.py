"""What `vhead bench` prints."""

from rich import box
from rich.console import Console
from rich.table import Table

from vhead.benchmark.document import Document
from vhead.benchmark.summary import LEGEND, MODES, facts, times


def report(console: Console, document: Document) -> None:
    """Prints what was measured where, a table for each mode, and the legend."""
    for line in facts(document):
        _print(console, line)
    for mode, title in MODES.items():
        console.print()
        console.print(_table(title, *times(document, mode)))
    _print(console, f"\n{LEGEND}")


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _table(title: str, headings: list[str], *rows: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in headings:
        is_label = heading == headings[0]
        table.add_column(heading, justify="left" if is_label else "right", no_wrap=is_label)
    for row in rows:
        table.add_row(*row)
    return table
