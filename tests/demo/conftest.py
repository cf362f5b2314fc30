"""What the demo's tests share: the bundled rollouts, scored once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vhead import Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.demo.judgement import Judged, judge
from vhead.demo.rollouts import DemoRollout, read_demo_rollouts

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="session")
def rollouts() -> list[DemoRollout]:
    return read_demo_rollouts()


@pytest.fixture(scope="session")
def scorer() -> Scorer:
    return Scorer.from_pretrained(demo_model_path(), device="cpu")


@pytest.fixture(scope="session")
def judge_all(rollouts: list[DemoRollout]) -> Callable[[Scorer], list[Judged]]:
    """Scores the bundled rollouts with any scorer."""

    def judged(scorer: Scorer) -> list[Judged]:
        scores = scorer.score([Rollout(rollout.prompt, rollout.completion) for rollout in rollouts])
        return [judge(rollout, score) for rollout, score in zip(rollouts, scores, strict=True)]

    return judged


@pytest.fixture(scope="session")
def judged(judge_all: Callable[[Scorer], list[Judged]], scorer: Scorer) -> list[Judged]:
    return judge_all(scorer)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the modules of `tools/` importable, as they are for a script there."""
    monkeypatch.syspath_prepend(TOOLS)
    return TOOLS
