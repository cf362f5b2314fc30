import pickle
import sys
import typing

import numpy as np
import pyarrow as pa
import pytest

from vhead import Score, Scores
from vhead.errors import MissingExtraError, MissingFieldError, MissingPackageError
from vhead.scoring import views as module
from vhead.scoring.scores import offsets_of

LENGTHS = [3, 1, 4, 2]


def make(lengths=LENGTHS, ids=None, computed=None, **changes):
    rng = np.random.default_rng(1)
    count, total = len(lengths), sum(lengths)
    arrays = {
        "ids": tuple(f"r{i}" for i in range(count)) if ids is None else ids,
        "indices": np.arange(count),
        "prompt_lengths": rng.integers(1, 9, count),
        "offsets": offsets_of(np.array(lengths, np.int64)),
    }
    fields = {
        "values": rng.normal(size=total).astype(np.float32),
        "logprobs": rng.normal(size=total).astype(np.float32),
        "reward": rng.normal(size=count).astype(np.float32),
    }
    fields |= computed or {}
    return Scores(computed={name: array for name, array in fields.items() if array is not None}, **arrays | changes)


def same(a, b):
    assert a.ids == b.ids
    assert a.fields == b.fields
    for name in ("indices", "prompt_lengths", "offsets", *a.fields):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)


def test_indexing_gives_views():
    scores = make()
    score = scores[2]
    assert isinstance(score, Score)
    assert (score.index, score.id, score.reward) == (2, "r2", float(scores.reward[2]))
    assert score.values.base is not None
    assert np.shares_memory(score.values, scores.values)
    np.testing.assert_array_equal(score.values, scores.values[4:8])
    assert scores[-1].id == "r3"
    with pytest.raises(IndexError):
        scores[4]


def test_length_and_iteration():
    scores = make()
    assert len(scores) == 4
    assert [score.id for score in scores] == list(scores.ids)
    assert [len(score.values) for score in scores] == LENGTHS
    assert scores.token_count == 10
    assert "4 rollouts, 10 completion tokens" in repr(scores)


@pytest.mark.parametrize(
    "key", [slice(1, 3), slice(0, 0), slice(None), slice(-2, None), slice(3, 1), slice(None, None, -1)]
)
def test_slices_equal_the_chosen_rollouts(key):
    scores = make()
    chosen = scores[key]
    assert isinstance(chosen, Scores)
    expected = [scores[i] for i in range(4)[key]]
    assert list(chosen.ids) == [score.id for score in expected]
    for got, want in zip(chosen, expected, strict=True):
        np.testing.assert_array_equal(got.values, want.values)
        np.testing.assert_array_equal(got.logprobs, want.logprobs)
        assert (got.index, got.reward, got.prompt_length) == (want.index, want.reward, want.prompt_length)


@pytest.mark.parametrize("scores", [make(), make()[2]], ids=["Scores", "Score"])
def test_a_field_that_was_not_asked_for_is_a_named_error(scores):
    with pytest.raises(
        MissingFieldError, match=r"^entropy: expected one of the fields that were computed \(values, lo"
    ):
        scores.entropy
    assert not hasattr(scores, "token_ids")
    assert hasattr(scores, "values")


@pytest.mark.parametrize("cls", [Score, Scores])
@pytest.mark.parametrize("name", ["values", "logprobs", "entropy", "reward", "token_ids"])
def test_type_checkers_see_a_field_as_an_array_and_never_as_none(cls, name):
    hint = typing.get_type_hints(getattr(cls, name).fget)["return"]
    assert type(None) not in typing.get_args(hint)
    assert hint is float or typing.get_origin(hint) is np.ndarray


def test_a_notebook_shows_a_table():
    scores = make([3, 0, 4, *[1] * 20], ids=("<b>", *[None] * 22))
    shown = scores._repr_html_()
    assert shown.count("<tr>") == 11
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    assert f"<td>{scores[2].reward:.4g}</td>" in shown
    assert f"<td>{scores[2].values.mean():.4g}</td>" in shown
    assert "and 13 more" in shown
    assert "more" not in make()._repr_html_()


def test_slices_are_views():
    scores = make()
    assert np.shares_memory(scores[1:3].values, scores.values)
    assert np.shares_memory(scores[1:3].reward, scores.reward)


def test_concat_puts_slices_together_again():
    scores = make()
    same(Scores.concat([scores[:1], scores[1:1], scores[1:3], scores[3:]]), scores)


def test_concat_refuses_nothing_and_different_fields():
    with pytest.raises(ValueError, match="at least one Scores"):
        Scores.concat([])
    with pytest.raises(ValueError, match=r"expected the fields \['values', 'logprobs', 'reward'\] in each"):
        Scores.concat([make(), make(computed={"reward": None})])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"computed": {"values": np.zeros(10)}}, r"values: expected float32 \[10\], got float64 \[10\]"),
        ({"computed": {"logprobs": np.zeros(9, np.float32)}}, r"logprobs: expected float32 \[10\], got float32 \[9\]"),
        ({"computed": {"reward": [1.0]}}, r"reward: expected float32 \[4\], got list"),
        ({"computed": {"token_offsets": np.zeros(10, np.int64)}}, r"token_offsets: expected int64 \[10, 2\], got"),
        ({"computed": {"value": np.zeros(10, np.float32)}}, r"computed: expected some of values, .*, got value"),
        ({"offsets": np.array([0, 3, 4, 8])}, r"offsets: expected int64 \[5\]"),
        ({"offsets": np.array([0, 4, 3, 8, 10])}, "offsets: expected a rising sequence"),
        ({"offsets": np.array([1, 3, 4, 8, 10])}, "offsets: expected a rising sequence from 0"),
    ],
)
def test_arrays_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_to_arrow_shares_the_arrays():
    scores = make()
    table = scores.to_arrow()
    assert table.schema.field("values").type == pa.list_(pa.float32())
    assert table.schema.field("reward").type == pa.float32()
    assert table.column_names == ["id", "values", "logprobs", "reward"]
    values = table.column("values").chunk(0).values
    assert values.buffers()[1].address == scores.values.ctypes.data
    assert table.column("values").to_pylist() == [score.values.tolist() for score in scores]


@pytest.mark.parametrize("limit", [1, 4, 5, 7])
def test_to_arrow_cuts_columns_longer_than_arrow_s_offsets_reach(monkeypatch, limit):
    monkeypatch.setattr(module, "_ARROW_LIST_LIMIT", limit)
    column = make().to_arrow().column("values")
    assert column.num_chunks > 1
    assert column.to_pylist() == [score.values.tolist() for score in make()]


def test_to_arrow_of_nothing():
    table = make([]).to_arrow()
    assert table.num_rows == 0
    assert table.schema.field("values").type == pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [((1, 2, 3, 4), pa.int64()), (("a", None, "b", "c"), pa.string()), ((1, "a", None, 2), pa.string())],
)
def test_arrow_ids_have_one_type(ids, expected):
    assert make(ids=ids).to_arrow().schema.field("id").type == expected


def test_to_arrow_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow is not installed; .*pip install 'vhead\[data\]'"):
        make().to_arrow()


def test_to_pandas_without_pandas_names_no_extra_that_lacks_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match=r"pandas is not installed; .*: pip install pandas$"):
        make().to_pandas()


def test_to_pandas():
    pytest.importorskip("pandas")
    scores = make()
    frame = scores.to_pandas()
    assert list(frame.columns) == ["id", "values", "logprobs", "reward"]
    assert np.shares_memory(frame["values"][2], scores.values)
    assert frame["reward"].dtype == np.float32
    assert list(frame["id"]) == list(scores.ids)


def test_scores_survive_pickling():
    same(pickle.loads(pickle.dumps(make())), make())
