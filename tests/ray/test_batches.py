"""Batches of rows as an actor of Ray Data scores them, without Ray."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vhead import Rollout, Scorer
from vhead.demo import demo_model_path, demo_rollouts_path
from vhead.errors import FieldError, RecordError
from vhead.ray import BatchScorer

MODEL = str(demo_model_path())
RECORDS = [
    {"id": record["id"], "prompt": record["prompt"][-60:], "completion": record["completion"][-40:]}
    for record in map(json.loads, demo_rollouts_path().read_text().splitlines()[:5])
]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.from_pretrained(MODEL, device="cpu")


def batch_scorer(**options) -> BatchScorer:
    return BatchScorer(MODEL, device="cpu", **options)


@pytest.fixture(scope="module")
def of_rewards() -> BatchScorer:
    return batch_scorer(returns=["values", "reward"])


@pytest.fixture(scope="module")
def forgiving() -> BatchScorer:
    return batch_scorer(returns=["values", "reward"], should_continue_on_error=True)


def test_a_batch_has_the_scorer_s_numbers_beside_its_own_columns(of_rewards: BatchScorer, scorer: Scorer) -> None:
    scored = of_rewards(pa.Table.from_pylist(RECORDS))
    expected = scorer.score([Rollout(r["prompt"], r["completion"]) for r in RECORDS], ("values", "reward"))
    assert scored.column_names == ["id", "prompt", "completion", "values", "reward"]
    assert scored.select(["id", "prompt", "completion"]).to_pylist() == RECORDS
    assert scored["reward"].to_numpy() == pytest.approx(expected.reward, abs=1e-5)
    assert scored["values"].combine_chunks().values.to_numpy() == pytest.approx(expected.values, abs=1e-5)
    assert len(set(scored["reward"].to_pylist())) == len(RECORDS)


def test_a_batch_of_numpy_arrays_is_taken_as_well(of_rewards: BatchScorer) -> None:
    texts = {name: np.array([r[name] for r in RECORDS], object) for name in RECORDS[0]}
    assert of_rewards(texts).equals(of_rewards(pa.Table.from_pylist(RECORDS)))
    ids = {"prompt_ids": np.array([[5, 6], [7, 8]]), "completion_ids": np.array([[9, 10, 11], [12, 13, 14]])}
    assert of_rewards(ids).num_rows == 2


def test_columns_are_found_under_other_names_and_written_with_a_suffix() -> None:
    renamed = [{"question": r["prompt"], "completion": r["completion"], "reward": 1.0} for r in RECORDS]
    scored = batch_scorer(returns=["reward"], fields={"prompt": "question"}, suffix="_model")(
        pa.Table.from_pylist(renamed)
    )
    assert scored.column_names == ["question", "completion", "reward", "reward_model"]


def test_a_column_that_scores_would_hide_is_named(of_rewards: BatchScorer) -> None:
    taken = pa.Table.from_pylist([{**record, "reward": 1.0} for record in RECORDS])
    with pytest.raises(FieldError, match=r"the data set: reward: expected no such column .*`suffix`, got one"):
        of_rewards(taken)


def test_a_row_that_cannot_be_scored_is_named_with_its_id(of_rewards: BatchScorer) -> None:
    broken = [*RECORDS[:2], {**RECORDS[2], "completion": ""}]
    with pytest.raises(RecordError, match=rf"row 2 of a batch \(id '{RECORDS[2]['id']}'\): completion: expected text"):
        of_rewards(pa.Table.from_pylist(broken))


def test_rows_that_cannot_be_scored_stay_in_their_places(forgiving: BatchScorer, of_rewards: BatchScorer) -> None:
    broken = [RECORDS[0], {**RECORDS[1], "completion": ""}, RECORDS[2], {"id": "x", "prompt": "a", "completion": None}]
    scored = forgiving(pa.Table.from_pylist(broken)).to_pylist()
    alone = of_rewards(pa.Table.from_pylist([RECORDS[0], RECORDS[2]]))["reward"].to_pylist()
    assert [row["id"] for row in scored] == [row["id"] for row in broken]
    assert [row["reward"] for row in scored] == [pytest.approx(alone[0]), None, pytest.approx(alone[1]), None]
    assert [row["values"] is None for row in scored] == [False, True, False, True]
    errors = [row["__inference_error__"] for row in scored]
    assert errors[0] == errors[2] == ""
    assert errors[1].startswith("row 1 of a batch")
    assert errors[3].startswith("row 3 of a batch (id 'x')")


def test_what_is_found_while_encoding_is_told_of_the_right_row(forgiving: BatchScorer) -> None:
    rows = [{"prompt_ids": [1, 2], "completion_ids": [3, token]} for token in (4, 10**6, 5)]
    scored = forgiving(pa.Table.from_pylist(rows)).to_pylist()
    assert [bool(row["__inference_error__"]) for row in scored] == [False, True, False]
    assert scored[1]["reward"] is None


@pytest.mark.parametrize("count", [0, 2])
def test_a_batch_without_a_good_row_has_the_same_columns(
    forgiving: BatchScorer, of_rewards: BatchScorer, count: int
) -> None:
    broken = pa.Table.from_pylist([{**record, "completion": ""} for record in RECORDS])[:count]
    scored = forgiving(broken)
    usual = forgiving(pa.Table.from_pylist(RECORDS))
    assert scored.num_rows == count
    assert scored.schema.equals(usual.schema)
    assert scored["reward"].null_count == count


def test_pairs_are_refused_with_what_to_do(of_rewards: BatchScorer) -> None:
    pair = {"prompt": "Is it?", "chosen": " Yes.", "rejected": " No."}
    with pytest.raises(FieldError, match="chosen: expected one completion; score the two sides of pairs as two rows"):
        of_rewards(pa.Table.from_pylist([pair]))


def test_chats_say_which_tokens_are_the_model_s(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    config["chat_template"] += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    scored = BatchScorer(str(folder), device="cpu", returns=["values"])(
        pa.Table.from_pylist([{"messages": chat}, {"messages": chat}])
    )
    (mask, _), (values, _) = scored["completion_mask"].to_pylist(), scored["values"].to_pylist()
    assert any(mask)
    assert len(mask) == len(values)


def test_candidates_of_the_rows_are_scored(of_rewards: BatchScorer) -> None:
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7, 8], "candidates": [[1, 2, 3], [4, 5, 6]]}] * 2
    scored = of_rewards(pa.Table.from_pylist(rows))
    assert np.shape(scored["candidate_logprobs"].to_pylist()) == (2, 2, 3)
