"""The OpenAPI document against the server: it names all that is there, and what it allows never fails the server."""

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.attack.scale import scaled

EXAMPLES = scaled(5, 2000)
OPERATIONS = [
    ("POST", path)
    for path in (
        "/score", "/classify", "/v1/embeddings", "/pooling", "/tokenize", "/get_reward", "/v1/score/evaluation",
        "/reload", "/weights/rollback",
    )
] + [("GET", path) for path in ("/", "/health", "/ready", "/metrics", "/v1/models", "/weights")]  # fmt: skip


@pytest.fixture(scope="module")
def document(server):
    return server.ask("GET", "/openapi.json").json


def test_the_document_names_every_route_and_what_errors_look_like(document, server):
    found = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    assert sorted(found) == sorted(OPERATIONS)
    for methods in document["paths"].values():
        for described in methods.values():
            assert {"4XX", "5XX"} <= described["responses"].keys()
            assert described["security"] == []
    error = document["components"]["schemas"]["Error"]
    jsonschema.validate(server.post("/score", b"{").json, error)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"detail": "another form"}, error)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_whatever_the_document_allows_the_server_does_not_fail(document, server, method, path):
    operation = schemathesis.openapi.from_dict(document)[path][method]
    statuses = set()

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def ask(case):
        answer = case.call(base_url=f"http://127.0.0.1:{server.port}", timeout=30)
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text

    ask()
    assert statuses
