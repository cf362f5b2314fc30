"""Requests that cannot be answered: each gets one clear sentence, and the server goes on."""

import base64
import gzip
import http.client
import io
import json
import socket
import time
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest

from tests.serve.conftest import PATIENCE_S
from vhead import Rollout
from vhead.errors import RequestError
from vhead.scoring.fields import Asked
from vhead.serve import models
from vhead.serve.limits import RequestLimits
from vhead.serve.weights import Weights

ARROW = "application/vnd.apache.arrow.stream"
GOOD = {"rollouts": [{"prompt": "The value", "completion": " of the head"}]}


def stream(table: pa.Table, **options) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue()


def npy(array, **changed) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    data = file.getvalue()
    for old, new in changed.get("replaced", ()):
        data = data.replace(old, new)
    return base64.b64encode(data).decode()


def of_ids(**fields):
    return {"rollouts": [{"prompt_ids": [1, 2], "completion_ids": [3, 4], **fields}]}


def nested(message, tools):
    """A chat, with lists in the message or in the tool that JSON may have and Python does not go down to."""
    deep: list = []
    for _ in range(900):
        deep = [deep]
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    if tools:
        return {"rollouts": [{**record, "tools": [{"a": deep}]}]}
    return {"rollouts": [{"messages": [{**message, "name": deep}, record["messages"][1]]}]}


NESTED = b'{"rollouts": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_BODIES = {
    "malformed JSON": ("/score", b'{"rollouts": [', 400, "the body: expected JSON"),
    "no body": ("/score", b"", 400, "the body: expected JSON"),
    "half a character": ("/score", b'{"rollouts": "\xff"}', 400, "the body"),
    "another type": ("/score", b"[]", 400, "the body: expected `object`, got `array`"),
    "deep nesting": ("/score", NESTED, 400, "the body"),
    "deep nesting in messages": ("/pooling", b'{"messages":' + b'[{"a":' * 50_000, 400, "the body"),
    "an unknown field": ("/score", {**GOOD, "retruns": ["values"]}, 400, "unknown field `retruns`"),
    "no rollouts": ("/score", {"rollouts": []}, 400, "rollouts: expected at least one, got none"),
    "unknown model": ("/score", {**GOOD, "model": "../../etc/passwd"}, 404, "model: expected one of demo"),
    "unknown model in /classify": ("/classify", {"model": "x", "input": "abc"}, 404, "model: expected one of demo"),
    "unknown returns": ("/score", {**GOOD, "returns": ["worth"]}, 400, "returns: expected some of values"),
    "temperature 0": ("/score", {**GOOD, "temperature": 0}, 400, "temperature: expected a positive number"),
    "NaN": ("/score", b'{"rollouts": [], "temperature": NaN}', 400, "the body: expected JSON"),
    "an infinite number": ("/score", b'{"rollouts": [], "temperature": 1e999}', 400, "the body"),
    "empty text": ("/score", {"rollouts": [{"prompt": "", "completion": "a"}]}, 400, "rollouts[0]: prompt: expected"),
    "an id out of range": ("/score", of_ids(completion_ids=[3, 99999]), 400, "rollouts[0]: completion: expected token"),
    "a negative id": ("/score", of_ids(completion_ids=[3, -1]), 400, "$.rollouts[0].completion_ids[1]"),
    "an id beyond 64 bits": ("/score", of_ids(completion_ids=[3, 2**70]), 400, "completion_ids"),
    "a mask of another length": ("/score", of_ids(completion_mask=[True]), 400, "rollouts[0]: completion_mask"),
    "too long": ("/score", of_ids(completion_ids=[3] * 3000), 400, "expected at most the model's"),
    "too many tokens": ("/score", {"rollouts": of_ids(completion_ids=[3] * 400)["rollouts"] * 20}, 413, "5000 tokens"),
    "too much text": (
        "/score",
        {"rollouts": [{"prompt": "a" * 50_000, "completion": "b"}]},
        413,
        "at most 40,000 char",
    ),
    "too much text in inputs": ("/classify", {"input": ["a" * 30_000] * 2}, 413, "at most 40,000 characters of text"),
    "too much text in messages": (
        "/pooling",
        {"messages": [{"role": "user", "content": "a" * 50_000}]},
        413,
        "at most 40,000 characters of text",
    ),
    "too much text to tokenise": ("/tokenize", {"prompt": "a" * 50_000}, 413, "at most 40,000 characters of text"),
    "too many rollouts": ("/score", {"rollouts": GOOD["rollouts"] * 65}, 413, "at most 64 rollouts"),
    "different candidates": (
        "/score",
        {"rollouts": [*of_ids(candidates=[[1], [2]])["rollouts"], *of_ids()["rollouts"]]},
        400,
        "rollouts[1]: candidates: expected candidates, because they are asked for, got none",
    ),
    "other numbers of candidates": (
        "/score",
        {"rollouts": [one["rollouts"][0] for one in (of_ids(candidates=[[1], [2]]), of_ids(candidates=[[1, 2]] * 2))]},
        400,
        "rollouts[1]: candidates: expected 1 for each token, as rollouts[0] has",
    ),
    "candidates that nobody brought": (
        "/score",
        {**of_ids(), "returns": ["candidates"]},
        400,
        "rollouts[0]: candidates: expected candidates",
    ),
    "a temperature that float32 cannot divide by": (
        "/score",
        {**GOOD, "returns": ["logprobs"], "temperature": 1e-45},
        400,
        "temperature: expected a positive number of 1e-30 or more, got 1e-45",
    ),
    "a name beyond 64 bits": ("/score", of_ids(id=2**70), 400, "$.rollouts[0].id"),
    "a negative name beyond 64 bits": ("/score", of_ids(id=-(2**70)), 400, "$.rollouts[0].id"),
    "deep nesting in a message": ("/score", nested({"role": "user", "content": "a"}, []), 400, "not nested as deeply"),
    "deep nesting in a tool": ("/score", nested({}, [{}]), 400, "rollouts[0]: tools: expected objects"),
    "a task of another route": (
        "/classify",
        {"input": "abc", "task": "token_classify"},
        400,
        "task: expected classify, got token_classify",
    ),
    "a pair": (
        "/score",
        {"rollouts": [{"prompt": "a", "chosen": "b", "rejected": "c"}]},
        400,
        "unknown field `chosen`",
    ),
    "mixed text and ids": ("/classify", {"input": ["text", [1, 2]]}, 400, "input: expected texts alone"),
    "mixed ids and lists": ("/pooling", {"input": [1, [1, 2]]}, 400, "input: expected texts alone"),
    "empty input": ("/classify", {"input": []}, 400, "input: expected a text"),
    "an empty text in a list": (
        "/get_reward",
        {"query": ["a text", ""]},
        400,
        "query[1]: tokens: expected at least two",
    ),
    "one token": ("/classify", {"input": [5]}, 400, "input[0]: tokens: expected at least two, got 1"),
    "ids out of range in /classify": (
        "/classify",
        {"input": [[5, 6], [5, 6, 99999]]},
        400,
        "input[1]: tokens: expected token ids below the vocabulary's 264, got 99999 at position 2",
    ),
    "ids out of range in /pooling": (
        "/pooling",
        {"input": [5, 99999, 6], "task": "token_classify"},
        400,
        "input[0]: tokens: expected token ids below the vocabulary's 264, got 99999 at position 1",
    ),
    "too long for the model in /get_reward": (
        "/get_reward",
        {"query": ["a text", "a " * 2000]},
        400,
        "query[1]: tokens: expected at most the model's 512 tokens, got 4000",
    ),
    "too long for the model in /classify": (
        "/classify",
        {"input": [7] * 600},
        400,
        "input[0]: tokens: expected at most the model's 512 tokens, got 600",
    ),
    "messages for a model without a template": (
        "/pooling",
        {"messages": [{"role": "user", "content": "a"}]},
        400,
        "messages: expected a tokenizer with a chat template, got one without",
    ),
    "half a surrogate pair in /get_reward": ("/get_reward", b'{"query": "\\ud800"}', 400, ""),
    "too many queries": ("/get_reward", {"query": ["abc"] * 65}, 413, "at most 64 entries of query in a request"),
    "too many inputs": ("/classify", {"input": ["abc"] * 65}, 413, "at most 64 entries of input in a request, got 65"),
    "negative ids in /classify": ("/classify", {"input": [-5, 9]}, 400, "input[0]: tokens: expected token ids >= 0"),
    "neither input nor messages": ("/pooling", {"model": "demo"}, 400, "either input or messages"),
    "an unknown task": ("/pooling", {"input": "abc", "task": "embed"}, 400, "embed"),
    "another encoding": ("/pooling", {"input": "abc", "encoding_format": "hex"}, 400, "hex"),
    "half a surrogate pair": ("/classify", b'{"input": "\\ud800"}', 400, ""),
    "too few tokens of LLaMA-Factory's": ("/v1/score/evaluation", {"messages": ["ab"], "max_length": 1}, 400, ">= 2"),
    "base64 that is none": ("/score", of_ids(prompt_ids="§§"), 400, "rollouts[0]: prompt_ids: expected base64"),
    "a .npy file with objects": ("/score", of_ids(prompt_ids=npy(np.array([{}]))), 400, "an array of object"),
    "a .npy file with floats": ("/score", of_ids(prompt_ids=npy(np.ones(2))), 400, "an array of float64"),
    "a .npy file whose shape is no number": (
        "/score",
        of_ids(prompt_ids=npy(np.arange(1), replaced=[(b"(1,), }   ", b"(True,), }")])),
        400,
        "rollouts[0]: prompt_ids",
    ),
    "a .npy file that states too much": (
        "/score",
        of_ids(prompt_ids=npy(np.arange(2), replaced=[(b"(2,)", b"(2999999999999,)")])),
        400,
        "rollouts[0]: prompt_ids",
    ),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_gets_one_clear_sentence(server, name):
    path, body, status, message = BAD_BODIES[name]
    answer = server.post(path, body)
    assert (answer.status, message in answer.message) == (status, True), answer.body
    assert "\n" not in answer.message
    assert "Traceback" not in answer.message
    assert set(answer.json["error"]) == {"message", "type", "code", "request_id"}


BAD_ARROW = {
    "bytes": (b"not arrow", 400, "expected a stream of Arrow's IPC format"),
    "a stream that ends early": (stream(pa.table({"prompt": ["a"] * 50}))[:-90], 400, "expected a stream"),
    "a stream without its end": (
        stream(pa.table({"prompt": ["ab"], "completion": ["cd"]}))[:-8],
        400,
        "it was cut off",
    ),
    "nothing": (b"", 400, "it was cut off"),
    "a compressed bomb": (stream(pa.table({"prompt": ["a" * 2**24]}), compression="zstd"), 415, "uncompressed"),
    "a dictionary": (stream(pa.table({"prompt": pa.array(["a"]).dictionary_encode()})), 400, "without dictionaries"),
    "nothing a thousand times": (stream(pa.table({"prompt": pa.nulls(10**6)})), 413, "at most 64 rollouts"),
    "lists that overlap": (
        stream(pa.table({"prompt_ids": pa.array([[1, 2]], pa.list_view(pa.int64()))})),
        400,
        "prompt_ids: expected text, numbers",
    ),
    "a null among ids": (
        stream(pa.table({"prompt_ids": [[1, None]], "completion_ids": [[1]]})),
        400,
        "rollouts[0]: prompt_ids",
    ),
    "no completion": (stream(pa.table({"prompt": ["a"]})), 400, "rollouts[0]: completion"),
}


@pytest.mark.parametrize("name", BAD_ARROW)
def test_a_bad_stream_of_arrow_gets_one_clear_sentence(server, name):
    body, status, message = BAD_ARROW[name]
    answer = server.post("/score", body, Content_Type=ARROW)
    assert (answer.status, message in answer.message) == (status, True), answer.body


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"Content_Type": "text/plain"}, 415, "Content-Type: expected one of application/json"),
        ({"Content_Encoding": "gzip"}, 415, "Content-Encoding: expected an uncompressed body"),
        ({"Accept": "image/png"}, 406, "Accept: expected one of"),
    ],
)
def test_other_forms_are_refused(server, headers, status, message):
    answer = server.post("/score", gzip.compress(json.dumps(GOOD).encode()), **headers)
    assert answer.status == status
    assert answer.message.startswith(message)


@pytest.mark.parametrize("query", ["?retruns=values", "?temperature=hot", "?returns=values&returns=reward"])
def test_a_bad_query_is_refused(server, query):
    body = stream(pa.table({"prompt": ["ab"], "completion": ["cd"]}))
    assert server.post(f"/score{query}", body, Content_Type=ARROW).status == 400


@pytest.mark.parametrize(("top", "candidates"), [(5, None), (0, [[1, 2, 3, 4, 5]] * 2), (2, [[1, 2, 3]] * 2)])
def test_more_selected_tokens_than_a_request_may_have_are_refused(scorer, monkeypatch, top, candidates):
    monkeypatch.setattr(models, "_MOST_SELECTED", 19)
    served = models.ServedModel(scorer, ["demo"], Weights(scorer.model), RequestLimits())
    one = Rollout([1, 2], [3, 4], candidates=candidates)
    asked = Asked(("logprobs",), top=top)
    assert served.prepare([one], asked).tokens == 4
    with pytest.raises(RequestError, match=r"at most 19 log-probabilities .* got more up to rollouts\[1\]") as refused:
        served.prepare([one, one], asked)
    assert refused.value.status == 413


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(server):
    connection = socket.create_connection(("127.0.0.1", server.port), 30)
    with connection:
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 104857600\r\n\r\n"
        )
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


def test_a_body_that_grows_beyond_the_limit_is_refused(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    parts = (b"a" * 65536 for _ in range(40))
    try:
        connection.request("POST", "/score", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError):
        pass
    else:
        assert connection.getresponse().status == 413
    connection.close()
    assert server.post("/score", GOOD).status == 200


def test_a_body_that_does_not_come_is_not_waited_for_for_ever(server):
    connection = socket.create_connection(("127.0.0.1", server.port), 30)
    with connection:
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b"HTTP/1.1 408"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow", b"HTTP/1.1 408"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHo", b"HTTP/1.1 200"),
        (b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n[[[[", b"HTTP/1.1 413"),
    ],
)
def test_a_connection_whose_request_stays_unfinished_is_closed(server, sent, answered):
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
        connection.sendall(sent)
        received = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(4096):
                received += part
                with suppress(OSError):
                    connection.sendall(b"a")  # A trickle does not set the clock back.
    assert received.startswith(answered)
    assert received.count(b"HTTP/1.1 ") <= 2


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n" + b"X-Flood: " + b"a" * 100_000,
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Flood: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-Flood: aaaaaaaa\r\n" * 5000 + b"\r\n",
        b"GET /health?" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/one\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_harms_nobody(server, sent):
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
        connection.sendall(sent)
        response = http.client.HTTPResponse(connection)
        response.begin()
        error = json.loads(response.read())["error"]
    assert (response.status, error["code"], error["type"]) == (400, 400, "BadRequest")
    assert set(error) == {"message", "type", "code", "request_id"}
    assert server.ask("GET", "/health").status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/score", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/docs", 404),
    ],
)
def test_other_paths_and_methods_are_errors_of_the_same_form(server, method, path, status):
    answer = server.ask(method, path)
    assert answer.status == status
    assert answer.json["error"]["code"] == status


def test_a_request_s_id_is_the_client_s_where_it_can_be_logged(server):
    good = server.ask("GET", "/health", X_Request_ID="trainer-1.step:7")
    assert good.headers["x-request-id"] == "trainer-1.step:7"
    bad = server.ask("GET", "/health", X_Request_ID='a"}{"b' + "c" * 100)
    assert len(bad.headers["x-request-id"]) == 32


def test_each_request_is_one_line_of_the_log_without_what_was_sent(server):
    answer = server.post("/score", {"rollouts": [{"prompt": "hidden", "completion": "secret"}]}, X_Request_ID="logged")
    assert answer.status == 200
    until = time.monotonic() + 10
    while not (lines := [line for line in server.lines() if line.get("request_id") == "logged"]):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert [(line["route"], line["status"], line["rollouts"]) for line in lines] == [("/score", 200, 1)]
    assert "secret" not in server.log.read_text()


def test_a_client_that_leaves_while_it_waits_is_forgotten(server):
    def cancelled() -> float:
        text = server.ask("GET", "/metrics").body.decode()
        return float(text.split("\nvhead_cancelled_requests_total ")[1].split()[0])

    before = cancelled()
    body = json.dumps({"rollouts": of_ids(completion_ids=[3] * 400)["rollouts"] * 12}).encode()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(0.05)
    until = time.monotonic() + 30
    while cancelled() <= before:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert server.post("/score", GOOD).status == 200


def test_metrics_tell_of_batches_tokens_and_the_step(server):
    assert server.post("/score", GOOD).status == 200
    text = server.ask("GET", "/metrics").body.decode()
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(numbers['vhead_weights_step{model="demo"}']) == 120
    assert float(numbers["vhead_tokens_total"]) >= float(numbers["vhead_computed_tokens_total"]) > 0
    for name in ("vhead_batch_fill_count", "vhead_queue_seconds_count", 'vhead_request_seconds_count{route="/score"}'):
        assert float(numbers[name]) > 0
    assert {"vhead_queued_requests", "vhead_queued_tokens"} < set(numbers)


def test_the_openapi_document_names_every_route_and_body(server):
    document = server.ask("GET", "/openapi.json").json
    posts = {path for path, methods in document["paths"].items() if "post" in methods}
    assert posts == {
        "/score", "/classify", "/pooling", "/v1/embeddings", "/get_reward", "/v1/score/evaluation", "/tokenize",
        "/reload", "/weights/rollback",
    }  # fmt: skip
    for path in posts:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["$ref"].rsplit("/", 1)[1] in document["components"]["schemas"]
