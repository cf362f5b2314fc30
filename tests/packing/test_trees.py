"""Packing by itself: no model, token ids only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhead.packing.trees import pack_trees, shared_prefixes

# Few different tokens and whole shared beginnings, so that sequences share, nest and repeat.
BEGINNINGS = [list(range(10)), list(range(8)), list(range(10, 22)), []]
SEQUENCES = st.lists(
    st.tuples(st.sampled_from(BEGINNINGS), st.lists(st.integers(0, 2), max_size=12))
    .map(lambda parts: parts[0] + parts[1])
    .filter(bool)
    .map(lambda tokens: np.array(tokens, np.int64)),
    min_size=1,
    max_size=12,
)


def visible(pack):
    """Which rows each row sees, by the segments."""
    seen = {}
    for segment in pack.segments:
        before = [row for start, stop in segment.path for row in range(start, stop)]
        for row in range(segment.start, segment.stop):
            seen[row] = [*before, *range(segment.start, row + 1)]
    return seen


@settings(deadline=None)
@given(SEQUENCES, st.sampled_from([1, 15, 40, 1000]), st.sampled_from([1, 8]))
def test_each_row_sees_the_tokens_of_its_own_sequence_and_no_others(sequences, budget, multiple):
    packs = list(pack_trees(sequences, budget, multiple))
    assert sorted(place for pack in packs for place in pack.places) == list(range(len(sequences)))
    for pack in packs:
        assert [row for segment in pack.segments for row in range(segment.start, segment.stop)] == list(
            range(len(pack.tokens))
        )
        seen = visible(pack)
        for at, place in enumerate(pack.places):
            rows = pack.rows(at)
            np.testing.assert_array_equal(pack.tokens[rows], sequences[place])
            np.testing.assert_array_equal(pack.positions[rows], np.arange(len(rows)))
            assert all(seen[row] == rows[: position + 1].tolist() for position, row in enumerate(rows.tolist()))


@settings(deadline=None)
@given(SEQUENCES, st.sampled_from([1, 15, 40]), st.sampled_from([1, 8]))
def test_packs_keep_to_the_budget_unless_one_sequence_alone_is_longer(sequences, budget, multiple):
    for pack in pack_trees(sequences, budget, multiple):
        alone = len({sequences[place].tobytes() for place in pack.places}) == 1
        assert len(pack.tokens) <= max(budget, multiple) or alone
        assert len(pack.tokens) % multiple == 0


def test_shared_tokens_stand_once():
    prompt = np.arange(100)
    sequences = [np.concatenate([prompt, np.full(5, tail)]) for tail in range(200, 208)]
    (pack,) = pack_trees(sequences, 10_000)
    assert len(pack.tokens) == 100 + 8 * 5
    (pack,) = pack_trees([*sequences, *sequences], 10_000)
    assert len(pack.tokens) == 100 + 8 * 5


def test_forks_inside_completions_are_found():
    prompt, middle = np.arange(20), np.arange(50, 60)
    sequences = [
        np.concatenate([prompt, middle, [1]]),
        np.concatenate([prompt, [3, 4]]),
        np.concatenate([prompt, middle, [2]]),
    ]
    (pack,) = pack_trees(sequences, 1000)
    assert len(pack.tokens) == 20 + 10 + 1 + 1 + 2


def test_a_common_first_token_does_not_make_a_tree():
    sequences = [np.array([1, tail, tail + 1]) for tail in range(10, 40, 3)]
    (pack,) = pack_trees(sequences, 1000)
    assert len(pack.tokens) == sum(map(len, sequences))
    assert all(not segment.path for segment in pack.segments)


def test_trees_are_not_divided_where_they_fit():
    prompts = [np.arange(start, start + 30) for start in (0, 100, 200)]
    sequences = [np.concatenate([prompt, np.full(10, tail)]) for prompt in prompts for tail in (1, 2, 3)]
    packs = list(pack_trees(sequences, 100))
    assert [len(pack.tokens) for pack in packs] == [60, 60, 60]


@pytest.mark.parametrize("big", [256, 65_536, 2**31])
def test_token_ids_of_several_bytes_are_ordered_as_numbers(big):
    prompt = np.arange(big, big + 12)
    sequences = [np.append(prompt, big), np.array([255] * 9), np.append(prompt, 1)]
    (pack,) = pack_trees(sequences, 1000)
    assert len(pack.tokens) == 12 + 1 + 1 + 9


@settings(deadline=None)
@given(SEQUENCES)
def test_shared_prefixes(sequences):
    groups = list(shared_prefixes(sequences))
    assert sorted(place for places, _ in groups for place in places) == list(range(len(sequences)))
    for places, shared in groups:
        assert all(len(sequences[place]) > shared for place in places)
        assert len({sequences[place][:shared].tobytes() for place in places}) == 1
