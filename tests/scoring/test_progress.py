"""What is counted while scoring, and what is said of it."""

import io
import sys

import pytest

from vhead.scoring import progress
from vhead.scoring.progress import ScoringProgress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rates_and_the_time_that_is_left(clock):
    with ScoringProgress(total=400, shown=False) as display:
        assert display.seconds_left is None
        clock[0] += 2.0
        display.advance(rollouts=100, tokens=6000, computed=1500)
        assert (display.rollout_rate, display.rate, display.seconds_left) == (50.0, 3000.0, 6.0)
        display.expect(1000)
        assert display.seconds_left == 18.0
        assert display.figures == "100 rollouts, 50/s, 3,000 tokens/s, 0:18 left"
        clock[0] += 2.0
    clock[0] += 50.0
    assert display.seconds == 4.0


def test_nobody_knows_how_long_a_pipe_is(clock):
    with ScoringProgress(shown=False) as display:
        clock[0] += 1.0
        display.advance(10, 100, 100)
        assert display.seconds_left is None
        assert display.figures == "10 rollouts, 10/s, 100 tokens/s"


@pytest.mark.parametrize(("computed", "shared"), [(0, 1.0), (25, 0.75), (100, 0.0), (130, 0.0)])
def test_the_part_that_was_shared(computed, shared):
    display = ScoringProgress(shown=False)
    assert display.shared == 0.0
    display.advance(5, 100, computed)
    assert display.shared == pytest.approx(shared)


@pytest.mark.parametrize(("seconds", "shown"), [(0.2, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_clock(seconds, shown):
    assert progress._clock(seconds) == shown


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_takes_one_line_however_narrow_the_terminal(monkeypatch, width):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    display = ScoringProgress(total=2_000_000)
    display.rollouts, display.tokens = 1_234_567, 987_654_321
    with display:
        display.advance(1, 1, 1)
        console = display._bar.console
        lines = console.render_lines(display._bar.get_renderable(), console.options.update(width=width))
    assert len(lines) == 1
    assert "1,234,568 rollouts" in "".join(segment.text for segment in lines[0])
