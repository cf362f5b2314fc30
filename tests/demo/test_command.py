"""`vhead demo`: every row at every width, with colour and without, and the files it can save."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.cells import cell_len
from rich.console import Console

from tests.typer_runner import RUNNER
from vhead.cli.demo import demo
from vhead.cli.demo_table import FEW_STYLES, PAPER, TITLE, coloured, fitting, marked, shade, show
from vhead.demo.judgement import Judged
from vhead.demo.rollouts import DemoRollout
from vhead.rollouts.files.jsonl import JsonlReader

WIDTHS = [80, 100, 140]
COLOUR = re.compile(r"\x1b\[[\d;]*m")


def printed(judged: list[Judged], width: int, **console: object) -> str:
    file = io.StringIO()
    show(Console(file=file, width=width, **console), judged, ["the last line"])
    return file.getvalue()


def completion_column(text: str) -> str:
    """The text of the column `completion`, its lines joined."""
    lines = text.splitlines()
    header = next(line for line in lines if "completion" in line)
    start, stop = header.index("completion"), header.index("value") if "value" in header else header.index("reward")
    return "".join(line[start : stop - 1].strip() + " " for line in lines)


def squeezed(text: str) -> str:
    return re.sub(r"[\s⟦⟧\[\]]", "", text)


@pytest.fixture(scope="module")
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(demo)
    return app


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_every_row_is_there_at_every_width(judged: list[Judged], width: int, colours: str | None) -> None:
    text = printed(judged, width, color_system=colours, force_terminal=colours is not None)
    plain = COLOUR.sub("", text)
    assert (text == plain) == (colours is None)
    assert max(cell_len(line) for line in plain.splitlines()) <= width
    shown = squeezed(completion_column(plain))
    for j in judged:
        assert squeezed(j.rollout.completion) in shown, j.rollout.id
        assert f"{j.reward:+.1f}" in plain
    assert plain.endswith("the last line\n")


def test_a_missing_row_is_noticed(judged: list[Judged]) -> None:
    shown = squeezed(completion_column(printed(judged[1:], 80)))
    assert squeezed(judged[0].rollout.completion) not in shown


def test_the_scale_is_diverging_and_saturates() -> None:
    assert [shade(value) for value in (-100.0, -4.0, 0.0, 4.0, 100.0)] == [0, 0, 4, 8, 8]
    assert len(PAPER) == 9
    steps = [shade(value) for value in np.linspace(-5, 5, 101)]
    assert steps == sorted(steps)
    assert set(steps) == set(range(9))


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_black_text_is_readable_on_every_colour() -> None:
    assert min((luminance(paper) + 0.05) / 0.05 for paper in PAPER) >= 7.0


@pytest.fixture
def half_corrupted() -> Judged:
    rollout = DemoRollout("id", "topic", "A ", "good good bad bad good", "kind", "in the middle", (10, 17), "PSF-2.0")
    return Judged(rollout, np.array([3.0] * 10 + [-3.0] * 8 + [3.0] * 4, np.float32), 3.0, 1.0)


def test_brackets_mark_runs_of_words_below_zero(half_corrupted: Judged) -> None:
    assert marked(half_corrupted, ("⟦", "⟧")).plain == "good good ⟦bad bad⟧ good"


def test_colours_follow_the_characters(half_corrupted: Judged) -> None:
    text = coloured(half_corrupted)
    spans = [(text.plain[s.start : s.end], s.style.bgcolor.name) for s in text.spans]
    assert spans == [("good good ", PAPER[7]), ("bad bad ", PAPER[1]), ("good", PAPER[7])]


def test_an_output_without_unicode_gets_plain_brackets(half_corrupted: Judged) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    show(Console(file=file, width=100), [half_corrupted], [])
    file.seek(0)
    assert "[[bad bad]]" in file.read()


def test_no_color_is_respected(judged: list[Judged], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(judged, 100, color_system="truecolor", force_terminal=True)
    assert "⟦" in text
    assert "48;2" not in text


def test_the_command_in_a_pipe_without_colour() -> None:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    program = "import typer; from vhead.cli.demo import demo; typer.run(demo)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    # One line that transformers 4.45 logs about itself.
    notes = [line for line in done.stderr.splitlines() if not line.startswith("Starting from v4.46, the `logits`")]
    assert (done.returncode, notes) == (0, [])
    assert "\x1b" not in done.stdout
    assert re.search(
        r"^reward +natural \+\d+\.\d, corrupted -\d+\.\d: AUC [01]\.\d\d, \d of 9 pairs in order$", done.stdout, re.M
    )
    assert re.search(r"^speed +\d+ tokens in .* on one thread: [\d,]+ tokens/s$", done.stdout, re.M)
    assert re.search(r"^head +(native|plain torch)", done.stdout, re.M)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 50), (120, 40)])
def test_title_and_legend_stay_on_the_screen(judged: list[Judged], width: int, height: int) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system="256")
    lines = ["a line"] * 6
    show(console, fitting(console, judged, len(lines)), lines)
    printed_lines = COLOUR.sub("", file.getvalue()).splitlines()
    assert len(printed_lines) < height
    assert printed_lines[0] == TITLE
    assert len(fitting(console, judged, len(lines))) >= 3


def test_all_passages_would_not_fit(judged: list[Judged]) -> None:
    assert len(printed(judged, 80).splitlines()) > 50


def test_older_terminals_get_a_scale_of_their_own_colours(judged: list[Judged]) -> None:
    text = printed(judged, 80, color_system="256", force_terminal=True)
    shown = {int(code) for code in re.findall(r"48;5;(\d+)", text)}
    assert shown == {int(style.bgcolor.name[6:-1]) for style in FEW_STYLES}
    assert [shade(value, len(FEW_STYLES)) for value in (-9, -4, 0, 4, 9)] == [0, 0, 3, 6, 6]


def test_black_text_is_readable_on_the_few_colours() -> None:
    papers = [style.bgcolor.get_truecolor().hex for style in FEW_STYLES]
    assert min((luminance(paper) + 0.05) / 0.05 for paper in papers) >= 7.0


@pytest.mark.parametrize("name", ["rollouts.parquet", "rollouts", "-"])
def test_rollouts_are_written_as_json_lines_alone(command, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(command, ["--write", name])
    assert result.exit_code == 2
    assert "expected a name that ends in .jsonl" in " ".join(result.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_the_quickstart_s_file_can_be_written(command: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    result = RUNNER.invoke(command, ["--write", str(path)])
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"27 rollouts written to {path}" in result.stderr
    rows = list(JsonlReader(io.BytesIO(path.read_bytes())))
    assert [row.rollouts()[0].kind for row in rows] == ["text"] * 27


def test_a_file_that_is_there_stays(command: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text("mine")
    result = RUNNER.invoke(command, ["--write", str(path)])
    assert result.exit_code == 1
    assert "expected a new file to write to, found one that is there" in result.stderr
    assert path.read_text() == "mine"


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_the_picture_is_in_colour_and_needs_no_network(command: typer.Typer, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"demo{suffix}"
    result = RUNNER.invoke(command, ["--passages", "1", "--save", str(path)])
    assert result.exit_code == 0, result.output
    text = path.read_text(encoding="utf-8")
    assert PAPER[8] in text
    assert not re.search(r"url\((?!#)|https?://(?!www\.w3\.org|www\.textualize\.io)", text)
    assert list(tmp_path.iterdir()) == [path]


def test_another_kind_of_picture_is_refused(command: typer.Typer, tmp_path: Path) -> None:
    result = RUNNER.invoke(command, ["--save", str(tmp_path / "demo.gif")])
    assert result.exit_code == 2
    assert "ends in .svg or .html, got 'demo.gif'" in re.sub(r"[\s│]+", " ", result.stderr)
