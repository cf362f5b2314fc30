"""The requests that reward clients send, wire for wire, and what these clients read from the answers."""

import base64
import json

import numpy as np
import pytest

from vhead import Rollout


@pytest.fixture(scope="module")
def texts(rollouts):
    return [one.prompt + one.completion for one in rollouts]


@pytest.fixture(scope="module")
def sequences(texts, scorer):
    return [scorer.encoder.whole(text, "text") for text in texts]


@pytest.fixture(scope="module")
def rewards(sequences, scorer):
    return scorer.score([Rollout(ids[:-1], ids[-1:]) for ids in sequences], ["reward"]).reward


@pytest.fixture(scope="module")
def at_each_token(sequences, scorer):
    """The head's output at each token, by the definition of values and rewards."""
    scores = scorer.score([Rollout(ids[:1], ids[1:]) for ids in sequences], ["values", "reward"])
    return [np.append(score.values, np.float32(score.reward)) for score in scores]


def test_verl_reads_a_reward_from_classify(server, texts, rewards):
    for text, reward in zip(texts, rewards, strict=True):
        answer = server.post("/classify", {"model": "demo", "input": text, "use_activation": False})
        assert np.float32(answer.json["data"][-1]["probs"][-1]) == reward


def test_verl_reads_a_reward_from_embeddings(server, texts, rewards):
    for text, reward in zip(texts, rewards, strict=True):
        answer = server.post("/v1/embeddings", {"model": "demo", "input": text})
        assert np.float32(answer.json["data"][-1]["embedding"][-1]) == reward


def test_openrlhf_reads_rewards(server, texts, rewards):
    body = {"query": texts, "prompts": [text[:5] for text in texts], "labels": [None] * len(texts)}
    answer = server.post("/get_reward", body)
    assert np.array_equal(np.array(answer.json["rewards"], np.float32), rewards)
    assert answer.json["scores"] == answer.json["rewards"]
    assert answer.json["extra_logs"] == {}


def test_llama_factory_reads_scores_and_calls_the_model_model(server, texts, rewards):
    answer = server.post("/v1/score/evaluation", {"model": "model", "messages": texts})
    assert np.array_equal(np.array(answer.json["scores"], np.float32), rewards)


def test_llama_factory_s_longest_length_cuts_the_end_off(server, texts, sequences, scorer):
    answer = server.post("/v1/score/evaluation", {"model": "model", "messages": texts[:1], "max_length": 40})
    expected = scorer.score([Rollout(sequences[0][:39], sequences[0][39:40])], ["reward"]).reward
    assert np.array_equal(np.array(answer.json["scores"], np.float32), expected)


@pytest.mark.parametrize("path", ["/classify", "/v1/embeddings", "/pooling"])
def test_several_texts_and_token_ids_are_taken_alike(server, texts, sequences, rewards, path):
    field = {"/classify": "probs", "/v1/embeddings": "embedding", "/pooling": "data"}[path]
    for given in (texts, [ids.tolist() for ids in sequences]):
        answer = server.post(path, {"input": given})
        found = [entry[field] for entry in answer.json["data"]]
        assert np.array_equal(np.array(found, np.float32), rewards[:, None])
        assert [entry["index"] for entry in answer.json["data"]] == list(range(len(texts)))
        assert answer.json["usage"]["prompt_tokens"] == sum(map(len, sequences))
        assert answer.json["step"] == 120
    one = server.post(path, {"input": sequences[2].tolist()})
    assert np.array_equal(np.array(one.json["data"][0][field], np.float32), rewards[2:3])


@pytest.mark.parametrize("path", ["/get_reward", "/v1/score/evaluation"])
def test_reward_servers_take_token_ids_too(server, sequences, rewards, path):
    field, key = {"/get_reward": ("query", "rewards"), "/v1/score/evaluation": ("messages", "scores")}[path]
    answer = server.post(path, {field: [ids.tolist() for ids in sequences]})
    assert np.array_equal(np.array(answer.json[key], np.float32), rewards)


def test_pooling_gives_the_output_at_each_token(server, texts, at_each_token):
    answer = server.post("/pooling", {"input": texts, "task": "token_classify"})
    for entry, expected in zip(answer.json["data"], at_each_token, strict=True):
        assert np.array_equal(np.array(entry["data"], np.float32), expected[:, None])


def test_pooling_s_base64_holds_the_same_numbers(server, texts, at_each_token):
    answer = server.post("/pooling", {"input": texts, "task": "token_classify", "encoding_format": "base64"})
    for entry, expected in zip(answer.json["data"], at_each_token, strict=True):
        assert np.array_equal(np.frombuffer(base64.b64decode(entry["data"]), "<f4"), expected)


def test_pooling_s_bytes_hold_the_same_numbers(server, texts, at_each_token):
    answer = server.post("/pooling", {"input": texts, "task": "token_classify", "encoding_format": "bytes"})
    assert answer.headers["content-type"] == "application/octet-stream"
    metadata = json.loads(answer.headers["metadata"])
    for entry, expected in zip(metadata["data"], at_each_token, strict=True):
        found = np.frombuffer(answer.body[entry["start"] : entry["end"]], "<f4").reshape(entry["shape"])
        assert np.array_equal(found, expected[:, None])


def test_an_activation_is_applied_where_it_is_asked_for(server, texts, rewards):
    answer = server.post("/classify", {"input": texts, "use_activation": True})
    found = np.array([entry["probs"][0] for entry in answer.json["data"]])
    assert np.allclose(found, 1 / (1 + np.exp(-rewards.astype(np.float64))), atol=1e-6)


def test_truncation_of_the_input_keeps_its_end(server, texts, sequences, scorer):
    answer = server.post("/classify", {"input": texts[0], "truncate_prompt_tokens": 30})
    expected = scorer.score([Rollout(sequences[0][-30:-1], sequences[0][-1:])], ["reward"]).reward
    assert np.array_equal(np.array(answer.json["data"][0]["probs"], np.float32), expected)


def test_tokenize_gives_the_ids_that_are_scored(server, texts, sequences):
    answer = server.post("/tokenize", {"model": "demo", "prompt": texts[0]})
    assert answer.json["tokens"] == sequences[0].tolist()
    assert answer.json["count"] == len(sequences[0])


def test_models_lists_the_served_name(server):
    (model,) = server.ask("GET", "/v1/models").json["data"]
    assert (model["id"], model["step"]) == ("demo", 120)
