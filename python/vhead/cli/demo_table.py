"""The demo's table: completions with each character coloured by its value, for any width and without colour too."""

import io
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from rich import box
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from vhead.demo.judgement import Judged
from vhead.demo.rollouts import IN_THE_MIDDLE, NATURAL

SATURATION = 4.0
WIDE = 100
TITLE = "Passages that the bundled model has not seen, and corrupted twins of them"
# From orange to blue, two hues that all common forms of colour blindness tell apart. Black text on light paper reads
# the same on dark and on light terminals.
PAPER = ("#f28c28", "#f5a653", "#f8c183", "#fbdcb8", "#f4f4f2", "#cfe0f3", "#a7c8ea", "#7fb0e1", "#66a3de")
STYLES = tuple(Style(color="#000000", bgcolor=paper) for paper in PAPER)
# The same scale among the 256 colours of older terminals, as evenly as these go; the nearest ones would change hue.
FEW_STYLES = tuple(Style(color="#000000", bgcolor=f"color({paper})") for paper in (208, 215, 223, 255, 153, 75, 39))
HEADER = Style(bold=True)
FAINT = Style(dim=True)


def shade(value: float, steps: int = len(PAPER)) -> int:
    """The step of the scale for a value: the first at -4 and below, the middle at zero, the last at +4 and above."""
    return round((min(1.0, max(-1.0, value / SATURATION)) + 1) / 2 * (steps - 1))


def styles_of(console: Console) -> tuple[Style, ...]:
    """The scale, as finely as the terminal can show it."""
    return STYLES if console.color_system == "truecolor" else FEW_STYLES


def coloured(judged: Judged, styles: Sequence[Style] = STYLES) -> Text:
    """The completion, each character on the colour of its value."""
    text = Text()
    characters = zip(judged.rollout.completion, judged.values.tolist(), strict=True)
    for step, run in groupby(characters, key=lambda pair: shade(pair[1], len(styles))):
        text.append("".join(character for character, _ in run), styles[step])
    return text


def _words(judged: Judged) -> Iterator[tuple[str, bool]]:
    """Each word of the completion, and whether its mean value is below zero."""
    start = 0
    for word in judged.rollout.completion.split(" "):
        values = judged.values[start : start + max(1, len(word))]
        yield word, bool(np.mean(values) < 0) if values.size else False
        start += len(word) + 1


def marked(judged: Judged, brackets: tuple[str, str]) -> Text:
    """The completion with brackets around runs of words whose mean value is below zero."""
    runs = [(low, " ".join(word for word, _ in run)) for low, run in groupby(_words(judged), key=lambda word: word[1])]
    return Text(" ".join(f"{brackets[0]}{run}{brackets[1]}" if low else run for low, run in runs))


def brackets_of(console: Console) -> tuple[str, str]:
    """White square brackets, or doubled plain ones where the output cannot encode them."""
    try:
        "⟦⟧".encode(console.encoding)
    except UnicodeEncodeError:
        return "[[", "]]"
    return "⟦", "⟧"


def _label(judged: Judged) -> Text:
    rollout = judged.rollout
    if rollout.extent == NATURAL:
        return Text(NATURAL)
    return Text(f"{rollout.kind}, {rollout.extent}" if rollout.extent == IN_THE_MIDDLE else rollout.kind)


def _prompt(judged: Judged) -> Text:
    return Text(f"{judged.rollout.prompt.strip()} …", FAINT, no_wrap=True, overflow="ellipsis")


def _empty_table(*, wide: bool) -> Table:
    """A table with its columns. On a narrow screen the text gets the room, and the reward is the only number."""
    table = Table(box=box.SIMPLE_HEAD, header_style=HEADER, padding=(0, 1, 0, 0), expand=True, show_edge=False)
    table.add_column("rollout", width=18 if wide else 14)
    table.add_column("completion", ratio=1, overflow="fold")
    for name, width in {"mean value": 6, "reward": 6, "bits per byte": 8}.items():
        if wide or name == "reward":
            table.add_column(name, justify="right", width=width)
    return table


def results_table(console: Console, judged: Sequence[Judged]) -> Table:
    """One section per passage: its prompt, then the passage and its twins."""
    in_colour, wide = uses_colour(console), console.width >= WIDE
    table = _empty_table(wide=wide)
    for _, members in groupby(judged, key=lambda j: j.rollout.topic):
        section = list(members)
        table.add_row(Text(section[0].rollout.topic, HEADER), _prompt(section[0]))
        for j in section:
            shown = coloured(j, styles_of(console)) if in_colour else marked(j, brackets_of(console))
            numbers = [f"{j.mean_value:+.1f}", f"{j.reward:+.1f}", f"{j.bits_per_byte:.1f}"]
            table.add_row(_label(j), shown, *(numbers if wide else numbers[1:2]))
        table.add_section()
    return table


def uses_colour(console: Console) -> bool:
    """Whether characters can be coloured: a terminal with colours enough for the scale, and no NO_COLOR."""
    return console.color_system in {"256", "truecolor"} and not console.no_color


def legend(console: Console) -> Text:
    """What the colours, or the marks, mean."""
    if not uses_colour(console):
        opening, closing = brackets_of(console)
        return Text(f"{opening}words{closing} have a mean value below zero: the head takes them for corrupted")
    text = Text("value after each character:  corrupted ")
    styles = styles_of(console)
    ends = {0: f" -{SATURATION:.0f} ", len(styles) // 2: "  0 ", len(styles) - 1: f" +{SATURATION:.0f} "}
    for step, style in enumerate(styles):
        text.append(ends.get(step, "   "), style)
    return text.append(" natural")


def fitting(console: Console, judged: Sequence[Judged], lines: int) -> list[Judged]:
    """As many passages, with their twins, as fit on the screen above this number of `lines`; at least one."""
    topics = list(dict.fromkeys(j.rollout.topic for j in judged))
    # Title, legend, two empty lines, and the one that the shell asks on.
    room = console.height - lines - 5
    for count in range(len(topics), 1, -1):
        shown = [j for j in judged if j.rollout.topic in topics[:count]]
        if len(console.render_lines(results_table(console, shown))) <= room:
            return shown
    return [j for j in judged if j.rollout.topic in topics[:1]]


def show(console: Console, judged: Sequence[Judged], lines: Sequence[str]) -> None:
    """Prints title, legend, table and the lines below it."""
    console.print(Text(TITLE, HEADER))
    console.print(legend(console))
    console.print()
    console.print(results_table(console, judged))
    console.print()
    for line in lines:
        console.print(Text(line))


def picture(suffix: str, judged: Sequence[Judged], lines: Sequence[str]) -> str:
    """What `show` prints, in colour and 100 columns wide, as the text of an .svg or .html file."""
    console = Console(file=io.StringIO(), record=True, force_terminal=True, color_system="truecolor", width=100)
    console.no_color = False
    show(console, judged, lines)
    if suffix == ".html":
        return console.export_html()
    return console.export_svg(title="vhead demo", code_format=_without_web_fonts(CONSOLE_SVG_FORMAT))


def _without_web_fonts(svg_format: str) -> str:
    """Rich's SVG asks a web server for its font; a monospaced font of the reader's own does as well."""
    return re.sub(r"@font-face \{\{.*?\}\}", "", svg_format, flags=re.DOTALL)
