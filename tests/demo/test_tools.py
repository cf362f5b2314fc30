"""The tools that made the bundled files: labels, the held-out topics, and that the rollouts are what they say."""

import hashlib
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

from vhead.demo.rollouts import NATURAL, DemoRollout

TEXT = "If the object does not define the method, a TypeError — as ever — is raised and the value is returned."


@pytest.fixture
def same_corpus(tools: Path) -> None:
    import demo_corpus

    text = demo_corpus.corpus_text(pydoc_data.topics.topics).encode()
    if hashlib.sha256(text).hexdigest() != demo_corpus.CORPUS_SHA256:
        pytest.skip("this interpreter ships another text than CPython 3.11.7")


def test_labels_mark_exactly_what_changed(tools: Path) -> None:
    import demo_corruption

    for kind in demo_corruption.CORRUPTIONS:
        passage = demo_corruption.corrupted_passage(TEXT, 10, 80, kind, np.random.default_rng(0))
        first, count = passage.natural.index(False), passage.natural.count(False)
        assert len(passage.natural) == len(passage.data)
        assert not any(passage.natural[first : first + count])
        assert TEXT.encode().startswith(passage.data[:first]), kind
        assert TEXT.encode().endswith(passage.data[first + count :]), kind
        assert passage.data != TEXT.encode(), kind
        passage.data.decode()


def test_corruptions_follow_their_seed(tools: Path) -> None:
    import demo_corruption

    for kind in demo_corruption.TRAINED:
        first, again, other = (
            demo_corruption.corrupt_span(TEXT, 0, 80, kind, np.random.default_rng(seed)) for seed in (1, 1, 2)
        )
        assert first == again != other, kind


def test_held_out_text_is_not_in_training(tools: Path) -> None:
    import demo_corpus

    corpus = demo_corpus.load_corpus(accept_other=True)
    training = "\n".join(demo_corpus.flatten(paragraph) for paragraph in corpus.training)
    held_out = [demo_corpus.flatten(p) for body in corpus.held_out.values() for p in demo_corpus.paragraphs(body)]
    runs = [text[i : i + 48] for text in held_out for i in range(0, len(text) - 47, 5)]
    assert len(runs) > 1000
    assert not [run for run in runs if run in training]
    assert any(training[i : i + 48] in training for i in range(100))


def test_another_corpus_is_refused(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import demo_corpus

    monkeypatch.setattr(pydoc_data.topics, "topics", {"if": "another text"})
    with pytest.raises(SystemExit, match="expected c6178f23"):
        demo_corpus.load_corpus()
    assert demo_corpus.load_corpus(accept_other=True).byte_count == len(b"if\nanother text")


@pytest.mark.usefixtures("same_corpus")
def test_natural_rollouts_are_held_out_text(tools: Path, rollouts: list[DemoRollout]) -> None:
    import demo_corpus

    held_out = demo_corpus.load_corpus().held_out
    for rollout in rollouts:
        found = rollout.prompt + rollout.completion in demo_corpus.flatten(held_out[rollout.topic])
        assert found == (rollout.kind == NATURAL), rollout.id


@pytest.mark.usefixtures("same_corpus")
def test_the_bundled_rollouts_can_be_made_again(tools: Path, rollouts: list[DemoRollout]) -> None:
    import make_demo_rollouts
    from demo_corpus import load_corpus

    assert list(make_demo_rollouts.rollouts(load_corpus().held_out)) == rollouts


def test_each_passage_has_its_twins(rollouts: list[DemoRollout]) -> None:
    sections = [rollouts[i : i + 3] for i in range(0, len(rollouts), 3)]
    for section in sections:
        assert [rollout.extent for rollout in section] == ["natural", "to the end", "in the middle"]
        assert len({(rollout.topic, rollout.prompt) for rollout in section}) == 1
    assert len({rollout.id for rollout in rollouts}) == len(rollouts) >= 24
    assert all(len(rollout.prompt) <= 80 and rollout.licence == "PSF-2.0" for rollout in rollouts)
