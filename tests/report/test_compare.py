"""The numbers of a comparison, against slow and plain ones; and what cannot be compared."""

import contextlib
import copy
import functools
import itertools
import json
import math
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from vhead import Scores
from vhead.errors import FieldError, FileFormatError
from vhead.report import compare, compare_files, records
from vhead.report.correlation import pearson, ranks, spearman
from vhead.report.records import Problems
from vhead.report.sides import Side

RNG = np.random.default_rng(11)
LENGTHS = (3, 1, 8, 0, 5)
OFFSETS = np.cumsum([0, *LENGTHS])
OURS = -RNG.exponential(1.0, OFFSETS[-1])
THEIRS = OURS + 0.4 * RNG.normal(size=len(OURS))
MASK = RNG.random(len(OURS)) < 0.7


def test_the_numbers_are_those_of_a_plain_loop() -> None:
    found = compare(OURS, THEIRS, offsets=OFFSETS, mask=MASK).logprobs
    assert found is not None
    d = [o - t for o, t, counts in zip(OURS.tolist(), THEIRS.tolist(), MASK.tolist(), strict=True) if counts]
    ratios = [math.exp(each) for each in d]
    assert found.tokens == len(d) == int(MASK.sum())
    assert found.k1 == pytest.approx(-sum(d) / len(d))
    assert found.k3 == pytest.approx(sum(math.exp(each) - 1 - each for each in d) / len(d))
    assert found.chi2 == pytest.approx(sum(r**2 for r in ratios) / len(d) - 1)
    assert found.effective_sample_size == pytest.approx(sum(ratios) ** 2 / sum(r**2 for r in ratios) / len(d))
    assert found.outside == pytest.approx(sum(not 0.9 <= r <= 1.1 for r in ratios) / len(d))
    assert found.mean_abs == pytest.approx(sum(map(abs, d)) / len(d))
    assert found.max_abs == max(map(abs, d)) == abs(found.worst[0].difference)


def test_positions_and_lengths_are_those_in_the_rollout() -> None:
    found = compare(OURS, THEIRS, offsets=OFFSETS).logprobs
    assert found is not None
    assert [(b.first, b.last, b.tokens) for b in found.by_position] == [(0, 0, 4), (1, 1, 3), (2, 3, 5), (4, 7, 5)]
    assert [(b.first, b.last, b.tokens) for b in found.by_length] == [(1, 1, 1), (2, 3, 3), (4, 7, 5), (8, 15, 8)]
    worst = int(np.abs(OURS - THEIRS).argmax())
    rollout = int(np.searchsorted(OFFSETS, worst, side="right")) - 1
    assert (found.worst[0].rollout, found.worst[0].position) == (rollout, worst - OFFSETS[rollout])


def test_padded_rows_give_the_numbers_of_flat_ones() -> None:
    rows = np.full((2, len(LENGTHS), max(LENGTHS)), np.nan)
    mask = np.zeros(rows.shape[1:], np.bool_)
    for at, (start, stop) in enumerate(pairwise(OFFSETS.tolist())):
        # On the left, which changes no position.
        rows[:, at, max(LENGTHS) - (stop - start) :] = OURS[start:stop], THEIRS[start:stop]
        mask[at, max(LENGTHS) - (stop - start) :] = True
    assert compare(*rows, mask=mask) == compare(OURS, THEIRS, offsets=OFFSETS)


def test_tensors_are_taken_with_gradients_and_in_bfloat16() -> None:
    ours = torch.tensor(OURS, requires_grad=True)
    assert compare(ours, torch.tensor(THEIRS)) == compare(OURS, THEIRS)
    short = torch.tensor(THEIRS).bfloat16()
    assert compare(ours, short) == compare(OURS, short.double().numpy())


def test_a_comparison_survives_pickling() -> None:
    found = compare(OURS, THEIRS, offsets=OFFSETS)
    assert pickle.loads(pickle.dumps(found)) == found


def test_ratios_beyond_floats_are_infinite_and_leave_the_sample_size() -> None:
    found = compare([-1.0, -2.0], [-1000.0, -2.0]).logprobs
    assert found is not None
    assert math.isinf(found.k3)
    assert found.effective_sample_size == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"ours": OURS[:-1]}, "theirs"),
        ({"ours": np.where(np.arange(len(OURS)) == 4, np.nan, OURS)}, "ours"),
        ({"theirs": np.where(np.arange(len(OURS)) == 4, -np.inf, OURS)}, "theirs"),
        ({"offsets": [0, 3, 99]}, "offsets"),
        ({"offsets": [0, 5, 3, len(OURS)]}, "offsets"),
        ({"mask": MASK[:-1]}, "mask"),
        ({"mask": OURS}, "mask"),
        ({"entropy": OURS[:-1]}, "entropy"),
        ({"ours": ["a"]}, "ours"),
        ({"ours": OURS.reshape(1, 1, -1)}, "ours"),
        ({"prompt_lengths": [1, 2]}, "prompt_lengths"),
    ],
)
def test_arrays_that_do_not_fit_are_named(arguments: dict[str, Any], field: str) -> None:
    given = {"ours": OURS, "theirs": THEIRS, "offsets": OFFSETS} | arguments
    with pytest.raises(FieldError) as caught:
        compare(given.pop("ours"), given.pop("theirs"), **given)
    assert caught.value.field == field


def test_rank_correlation_averages_ties() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    first = np.array([1.0, 2.0, 2.0, 5.0])
    assert spearman(first, np.exp(first)) == pytest.approx(1.0)
    assert spearman(first, -first) == pytest.approx(-1.0)
    assert pearson(first, np.exp(first)) == pytest.approx(np.corrcoef(first, np.exp(first))[0, 1])
    assert pearson(first, np.zeros(4)) is None


def scores(ids: tuple[str | None, ...], shift: float) -> Scores:
    rng = np.random.default_rng(2)
    tokens = int(OFFSETS[-1])
    return Scores(
        ids=ids,
        indices=np.arange(len(ids)),
        prompt_lengths=np.full(len(ids), 4),
        offsets=OFFSETS.astype(np.int64),
        computed={
            "logprobs": (rng.normal(size=tokens) + shift).astype(np.float32),
            "values": rng.normal(size=tokens).astype(np.float32),
            "reward": (rng.normal(size=len(ids)) + shift).astype(np.float32),
        },
    )


def test_scores_are_compared_in_all_that_they_have() -> None:
    found = compare(scores(tuple("abcde"), 0.0), scores(tuple("abcde"), 0.25))
    assert found.by_id
    assert found.logprobs is not None
    assert found.logprobs.k1 == pytest.approx(0.25)
    assert found.values is not None
    assert (found.values.count, found.values.max_abs) == (OFFSETS[-1], 0.0)
    assert found.reward is not None
    assert (found.reward.mean, found.reward.spearman) == (pytest.approx(-0.25), pytest.approx(1.0))


RECORDS = [
    {
        "id": f"r{at}",
        "completion": "one two three",
        "token_ids": [7, 8, 9],
        "token_offsets": [[0, 4], [4, 8], [8, 13]],
        "logprobs": RNG.normal(-1, 0.5, 3).tolist(),
        "old_logprobs": RNG.normal(-1, 0.5, 3).tolist(),
        "values": RNG.normal(size=(3, 2)).tolist(),
        "reward": float(RNG.normal()),
    }
    for at in range(6)
]
Edit = Callable[[dict[str, Any]], object]


MOVED = [{**record, "logprobs": (np.array(record["logprobs"]) + 0.1).tolist()} for record in RECORDS]


def written(path: Path, records: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


@pytest.fixture
def ours(tmp_path: Path) -> str:
    return written(tmp_path / "a.jsonl", RECORDS)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_of_both_formats_give_the_numbers_of_their_arrays(tmp_path: Path, ending: str) -> None:
    found = compare_files(written(tmp_path / f"a.{ending}", RECORDS))
    columns = [np.concatenate([record[name] for record in RECORDS]) for name in ("logprobs", "old_logprobs")]
    plain = compare(*columns, offsets=np.arange(0, 19, 3)).logprobs
    assert found.logprobs is not None
    assert plain is not None
    assert (found.logprobs.k3, found.logprobs.by_position) == (plain.k3, plain.by_position)
    worst = found.logprobs.worst[0]
    texts = ["one ", "two ", "three"]
    assert (worst.token, worst.token_id) == (texts[worst.position], 7 + worst.position)
    assert f"{worst.before}{worst.token}{worst.after}" == "one two three"


def test_records_are_matched_by_id_whatever_their_order(tmp_path: Path, ours: str) -> None:
    other = written(tmp_path / "b.jsonl", [*RECORDS[:0:-1], {**RECORDS[0], "id": "new"}])
    found = compare_files(ours, other)
    assert (found.rollouts, found.only_ours, found.only_theirs, found.by_id) == (5, 1, 1, True)
    assert found.logprobs is not None
    assert found.logprobs.max_abs == 0
    assert found.values is not None
    assert (found.values.count, found.values.max_abs) == (5 * 6, 0)


def test_records_without_ids_are_matched_by_position(tmp_path: Path, ours: str) -> None:
    without = [{name: value for name, value in record.items() if name != "id"} for record in RECORDS[:4]]
    found = compare_files(ours, written(tmp_path / "b.jsonl", without))
    assert (found.rollouts, found.only_ours, found.by_id) == (4, 2, False)


def test_columns_with_a_suffix_are_compared_with_each_other_and_the_mask(tmp_path: Path, ours: str) -> None:
    """And never with the environment's own reward."""
    plain = compare_files(ours, written(tmp_path / "b.jsonl", MOVED))
    names = ("logprobs", "values", "reward", "completion_mask", "token_ids")
    sides = [
        [
            {"id": record["id"], "reward": 1.0, **{f"{n}_v": record[n] for n in names if n in record}}
            for record in records
        ]
        for records in (RECORDS, MOVED)
    ]
    files = [written(tmp_path / name, side) for name, side in zip(("c.jsonl", "d.jsonl"), sides, strict=True)]
    found = compare_files(*files, ours_column="logprobs_v")
    assert replace(found, logprobs=None) == replace(plain, logprobs=None)
    assert found.logprobs is not None
    assert plain.logprobs is not None
    assert (found.tokens, found.logprobs.k3) == (plain.tokens, plain.logprobs.k3)
    with pytest.raises(FieldError, match=r"logprobs: expected the column, or the name of another .* logprobs_v, got"):
        compare_files(*files)


def test_null_at_a_token_that_does_not_count_is_as_good_as_a_number(tmp_path: Path) -> None:
    records = [{"logprobs": [-1.0, None], "old_logprobs": [-1.5, None], "completion_mask": [True, False]}]
    found = compare_files(written(tmp_path / "a.jsonl", records))
    assert (found.tokens, found.left_out) == (1, 0)
    assert found.logprobs is not None
    assert found.logprobs.max_abs == 0.5


def test_scores_of_other_completions_are_not_compared(tmp_path: Path) -> None:
    sides = [[{"id": at, "logprobs": [-1.0], "completion_ids": [token]} for at in range(2)] for token in (7, 8)]
    sides[1][0]["completion_ids"] = [7]
    found = compare_files(*(written(tmp_path / f"{at}.jsonl", side) for at, side in enumerate(sides)))
    assert (found.rollouts, found.left_out) == (1, 1)
    assert "completion_ids: expected those of" in found.problems[0]


def test_a_file_of_which_nothing_can_be_read_is_named_with_the_reason(tmp_path: Path, ours: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(pickle.dumps(RECORDS))
    Path(ours).write_text(f"{Path(ours).read_text()}no record\n")
    with pytest.raises(
        FileFormatError, match=r"b.jsonl: expected records with scores, got none that can be read: .*line 1"
    ):
        compare_files(ours, str(path))


def test_ids_that_repeat_are_taken_in_the_same_order_only(tmp_path: Path) -> None:
    repeated = [{**record, "id": f"r{at // 2}"} for at, record in enumerate(RECORDS)]
    first = written(tmp_path / "a.jsonl", repeated)
    assert compare_files(first, written(tmp_path / "b.jsonl", repeated)).rollouts == 6
    with pytest.raises(FieldError, match=r"line 2: id: expected each id once.*'r0' \(str\) there and at .*line 1"):
        compare_files(first, written(tmp_path / "c.jsonl", repeated[::-1]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r["logprobs"].pop(), "logprobs: expected 3 of them, as `logprobs` of .*a.jsonl: line 3 has, got 2"),
        (lambda r: r["logprobs"].__setitem__(1, math.nan), "logprobs: expected finite numbers .* got nan at token 1"),
        (lambda r: r["logprobs"].__setitem__(1, None), "logprobs: expected finite numbers .* got nan at token 1"),
        (lambda r: r.update(logprobs=["-1", "-2", "-3"]), "logprobs: expected a number for each token"),
        (lambda r: r.update(logprobs=-1.0), "logprobs: expected a number for each token"),
        (lambda r: r.pop("logprobs"), "logprobs: expected the field, which other records have"),
        (lambda r: r.update(token_ids=[7, 8, 10]), "token_ids: expected those of .*numbers are those of other tokens"),
        (lambda r: r.update(completion_mask=[True, False]), "completion_mask: expected 3 of them"),
        (lambda r: r.update(completion_mask=[1, 2, 0]), "completion_mask: expected true and false"),
        (lambda r: r.update(values=[[1.0], [2.0], [3.0]]), "values: expected 3 of 1 outputs, as .*, got 3 of 2"),
        (lambda r: r.update(values=[[1.0, 2.0], [3.0]]), "values: expected numbers, in lists of one length"),
        (lambda r: r.update(reward="high"), "reward: expected a number"),
    ],
)
def test_a_record_that_does_not_fit_is_named_and_the_others_compared(
    tmp_path: Path, ours: str, edit: Edit, message: str
) -> None:
    changed = json.loads(json.dumps(RECORDS))
    edit(changed[2])
    found = compare_files(ours, written(tmp_path / "b.jsonl", changed))
    assert found.left_out == 1
    assert "line 3 (id 'r2')" in found.problems[0]
    assert pytest.approx(0) == (found.logprobs.max_abs if found.logprobs else None)
    assert re.search(message, found.problems[0])


_FAULTS: list[Edit] = [
    lambda r: r["logprobs"].pop(),
    lambda r: r.pop("logprobs"),
    lambda r: r["logprobs"].__setitem__(1, math.inf),
    lambda r: r.update(completion_mask=[1, 0, 1]),
    lambda r: r.update(completion_mask=[1, 1]),
    lambda r: r.update(token_ids=[7, 8, 10]),
    lambda r: r.update(values=[0.1, 0.2, 0.3]),
    lambda r: r.update(values=[[0.1, 0.2]]),
    lambda r: r.update(values=[[0.1, 0.2], [math.nan, 0.3], [0.4, 0.5]]),
    lambda r: r.pop("values"),
    lambda r: r.update(reward=[1.0, 2.0]),
    lambda r: r.update(reward=math.nan),
    lambda r: r.update(entropy=[0.1, 0.2, math.nan]),
    lambda r: [r.pop(name) for name in ("logprobs", "old_logprobs", "values", "token_ids", "token_offsets")],
    lambda r: r.update(logprobs=[], token_ids=[], values=[]),
]


@pytest.mark.parametrize("seed", range(40))
def test_whole_columns_find_all_that_looking_at_each_pair_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    faults = random.Random(seed)
    sides: list[list[dict[str, Any]]] = [copy.deepcopy(RECORDS) for _ in range(2)]
    for record in itertools.chain(*sides):
        for edit in faults.sample(_FAULTS, faults.choice([0, 0, 0, 1, 1, 2])):
            with contextlib.suppress(KeyError, IndexError):
                edit(record)
    names = [written(tmp_path / f"{side}.jsonl", records) for side, records in zip("ab", sides, strict=True)]
    found = _compared(*names)

    judged = records._judged

    def look_at_all(ours: Side, theirs: Side, suspects: NDArray[np.bool_], check: Any, problems: Problems) -> Any:
        names = check.args[:1] if isinstance(check, functools.partial) else ()
        assert set(names) <= {"values", "reward"}
        there = [side.column(name).there for name in names for side in (ours, theirs)]
        return judged(ours, theirs, np.logical_and.reduce([np.ones(len(ours), np.bool_), *there]), check, problems)

    monkeypatch.setattr(records, "_judged", look_at_all)
    assert _compared(*names) == found


def _compared(ours: str, theirs: str) -> str:
    try:
        return repr(compare_files(ours, theirs))
    except FieldError as error:
        return str(error)


def test_a_broken_line_harms_no_other(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "a.jsonl", RECORDS))
    path.write_text("{broken\n" + path.read_text())
    found = compare_files(str(path))
    assert (found.rollouts, found.left_out) == (6, 1)
    assert found.problems[0].startswith(f"{path}: line 1: text: expected a JSON object")


def test_masked_tokens_do_not_count(tmp_path: Path) -> None:
    masked = [
        {**r, "completion_mask": [1, 0, 1], "logprobs": [r["logprobs"][0], 1e9, r["logprobs"][2]]} for r in RECORDS
    ]
    found = compare_files(written(tmp_path / "a.jsonl", masked))
    assert found.tokens == 12
    assert found.logprobs is not None
    assert found.logprobs.max_abs < 10


def test_columns_that_are_missing_are_named_with_those_there(tmp_path: Path, ours: str) -> None:
    with pytest.raises(
        FieldError, match=r"engine_logprobs: expected a column .* got the columns completion, id, logprobs"
    ):
        compare_files(ours, theirs_column="engine_logprobs")
    bare = written(tmp_path / "b.jsonl", [{"id": "r0", "text": "x"}])
    with pytest.raises(FieldError, match=r"one of logprobs, values, reward, got the columns id, text"):
        compare_files(ours, bare)


def test_files_without_common_records_or_without_records_are_named(tmp_path: Path, ours: str) -> None:
    other = written(tmp_path / "b.jsonl", [{**record, "id": f"x{record['id']}"} for record in RECORDS])
    with pytest.raises(FieldError, match=r"records with the same `id`, got 6 only in ours and 6 only in theirs"):
        compare_files(ours, other)
    with pytest.raises(FileFormatError, match="the file has none"):
        compare_files(ours, written(tmp_path / "c.jsonl", []))


def test_a_head_with_other_outputs_leaves_only_values_out(tmp_path: Path, ours: str) -> None:
    other = written(tmp_path / "b.jsonl", [{**record, "values": [1.0, 2.0, 3.0]} for record in RECORDS])
    found = compare_files(ours, other)
    assert found.logprobs is not None
    assert (found.values, found.left_out, found.rollouts) == (None, 6, 6)
    assert "values: expected 3 of 1 outputs, as" in found.problems[0]


def test_comparing_needs_no_torch(fresh_python: Callable[[str], str], ours: str) -> None:
    code = f"import sys, vhead\nvhead.report.compare_files({ours!r})\nprint({{'torch', 'pyarrow'}} & set(sys.modules))"
    assert fresh_python(code).endswith("set()")


@pytest.mark.parametrize(
    ("ids", "examples", "remedy"),
    [
        (["8", "0", "1"], r"0 \(int\) at a.jsonl: line 1 and '0' \(str\) at b.jsonl: line 2", "the same type on both"),
        (["x", "y", "z"], r"0 \(int\) at a.jsonl: line 1 and 'x' \(str\) at b.jsonl: line 1", "leave `id` out of one"),
    ],
)
def test_ids_of_which_none_is_in_both_are_shown_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: list[str], examples: str, remedy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, given in (("a.jsonl", range(3)), ("b.jsonl", ids)):
        Path(name).write_text("".join(f"{json.dumps({'id': id, 'reward': 1.0})}\n" for id in given))
    with pytest.raises(FieldError, match=f"3 only in ours and 3 only in theirs, such as {examples}; .*{remedy}"):
        compare_files("a.jsonl", "b.jsonl")
