"""`POST /score` against `Scorer.score`, in every form that rollouts and scores travel in."""

import base64
import io

import numpy as np
import pyarrow as pa
import pytest

ARROW = "application/vnd.apache.arrow.stream"
NPY = "application/vnd.vhead.npy+json"
RETURNS = ["values", "logprobs", "entropy", "reward", "prompt_value", "bootstrap", "tokens", "steps"]


def texts(rollouts):
    return [{"id": one.id, "prompt": one.prompt, "completion": one.completion} for one in rollouts]


def ids(rollouts, scorer):
    encoded = [scorer.encoder.encode(0, one, "rollout") for one in rollouts]
    return [(one.tokens[: one.prompt_length].tolist(), one.tokens[one.prompt_length :].tolist()) for one in encoded]


def unpacked(text: str):
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def packed(array) -> str:
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def test_text_gets_the_bits_of_the_scorer(server, scorer, rollouts):
    answer = server.post("/score", {"rollouts": texts(rollouts), "returns": RETURNS})
    assert answer.status == 200, answer.body
    expected = scorer.score(rollouts, RETURNS)
    assert (answer.json["model"], answer.json["step"]) == ("demo", 120)
    for row, score in zip(answer.json["scores"], expected, strict=True):
        assert (row["id"], row["prompt_length"]) == (score.id, score.prompt_length)
        for name in expected.columns:
            assert np.array_equal(np.asarray(row[name], expected.flat(name)[0].dtype), score.computed[name]), name


def test_without_returns_there_are_the_scorer_s_default_ones(server, scorer, rollouts):
    answer = server.post("/score", {"rollouts": texts(rollouts[:1])})
    assert set(answer.json["scores"][0]) == {"id", "prompt_length", "mask", *scorer.default_returns}


def test_ids_masks_candidates_and_top_logprobs(server, scorer, rollouts):
    from vhead import Rollout

    rng = np.random.default_rng(0)
    records, expected = [], []
    for prompt, completion in ids(rollouts, scorer):
        mask = rng.random(len(completion)) < 0.5
        mask[0] = True
        candidates = rng.integers(0, 200, (len(completion), 3))
        expected.append(Rollout(prompt, completion, mask=mask, candidates=candidates))
        records.append(
            {"prompt_ids": prompt, "completion_ids": completion, "completion_mask": mask.tolist(),
             "candidates": candidates.tolist()}
        )  # fmt: skip
    body = {"rollouts": records, "returns": ["logprobs", "reward"], "temperature": 0.7, "top_logprobs": 2}
    answer = server.post("/score", body)
    scores = scorer.score(expected, ["logprobs", "reward"], 0.7, top_logprobs=2)
    for row, score in zip(answer.json["scores"], scores, strict=True):
        assert row["mask"] == score.mask.tolist()
        for name in ("logprobs", "candidate_logprobs", "top_tokens", "top_logprobs"):
            assert np.array_equal(np.asarray(row[name], score.computed[name].dtype), score.computed[name]), name


def test_arrays_travel_as_base64_of_npy_files_both_ways(server, scorer, rollouts):
    pairs = ids(rollouts, scorer)
    records = [{"prompt_ids": packed(prompt), "completion_ids": packed(completion)} for prompt, completion in pairs]
    answer = server.post("/score", {"rollouts": records, "returns": RETURNS}, Accept=NPY)
    assert answer.headers["content-type"] == NPY
    expected = scorer.score(rollouts, RETURNS)
    arrays = {name: unpacked(text) for name, text in answer.json["arrays"].items()}
    assert np.array_equal(arrays["offsets"], expected.offsets)
    for name in set(expected.columns) - {"token_offsets"}:
        flat = expected.flat(name)[0]
        assert arrays[name].dtype == flat.dtype
        assert np.array_equal(arrays[name], flat), name


@pytest.mark.parametrize("as_ids", [True, False])
def test_arrow_travels_both_ways(server, scorer, rollouts, as_ids):
    if as_ids:
        prompts, completions = zip(*ids(rollouts, scorer), strict=True)
        table = pa.table({"id": [one.id for one in rollouts], "prompt_ids": prompts, "completion_ids": completions})
    else:
        table = pa.Table.from_pylist(texts(rollouts))
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, 2)
    answer = server.post(
        "/score?returns=values,reward&temperature=0.5&model=demo", sink.getvalue(), Content_Type=ARROW, Accept=ARROW
    )
    assert answer.status == 200, answer.body
    found = pa.ipc.open_stream(answer.body).read_all()
    expected = scorer.score(rollouts, ["values", "reward"])
    beside = found.select(["prompt_length", "mask"]).to_pydict()
    assert beside == {
        "prompt_length": expected.prompt_lengths.tolist(),
        "mask": [one.mask.tolist() for one in expected],
    }
    assert found.drop_columns(list(beside)).replace_schema_metadata().equals(expected.to_arrow())
    assert found.schema.metadata == {b"vhead": b'{"model": "demo", "step": 120}'}


def test_one_prompt_s_rollouts_in_many_requests_get_the_same_bits(server, scorer, rollouts):
    from concurrent.futures import ThreadPoolExecutor

    expected = scorer.score(rollouts, ["reward"]).reward
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda one: server.post("/score", {"rollouts": [one]}), texts(rollouts) * 8))
    rewards = np.array([answer.json["scores"][0]["reward"] for answer in answers], np.float32)
    assert np.array_equal(rewards, np.tile(expected, 8))
