"""Traces: a span for each request and each batch, and which belong together."""

import asyncio
import sys

import httpx2
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vhead.errors import EnvironmentVariableError, MissingExtraError
from vhead.serve.app import make_app
from vhead.serve.service import Service
from vhead.serve.tracing import Tracing, from_environment

BODY = {"rollouts": [{"prompt_ids": [5, 6], "completion_ids": [7, 8, 9]}]}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


def asked(scorer, exporter, *requests):
    """The statuses of requests to an application whose spans go to the exporter."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    service = Service(scorer, ["demo"], tracing=Tracing(provider))

    async def ask():
        transport = httpx2.ASGITransport(make_app(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
            answers = [client.request(method, path, **options) for method, path, options in requests]
            return [answer.status_code for answer in await asyncio.gather(*answers)]

    try:
        return asyncio.run(ask())
    finally:
        service.close()


def test_a_request_and_its_batch_are_spans_that_name_each_other(scorer, exporter):
    headers = {"x-request-id": "one", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    assert asked(scorer, exporter, ("POST", "/score", {"json": BODY, "headers": headers})) == [200]
    batch, request = exporter.get_finished_spans()
    assert (request.name, batch.name) == ("POST /score", "batch")
    about = {"http.route": "/score", "http.response.status_code": 200, "vhead.rollouts": 1, "vhead.tokens": 5}
    assert about.items() <= dict(request.attributes).items()
    assert (request.attributes["vhead.request_id"], request.attributes["vhead.batch"]) == ("one", 0)
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, PARENT)
    assert [link.context for link in batch.links] == [request.context]
    assert (batch.attributes["vhead.batch.number"], batch.attributes["vhead.batch.tokens"]) == (0, 5)
    assert request.start_time <= batch.start_time < batch.end_time <= request.end_time


def test_a_refusal_is_a_span_without_a_batch(scorer, exporter):
    assert asked(scorer, exporter, ("POST", "/score", {"json": {}}), ("GET", "/nothing", {})) == [400, 404]
    found = {span.name: span.attributes["http.response.status_code"] for span in exporter.get_finished_spans()}
    assert found == {"POST /score": 400, "GET none": 404}


def test_without_an_exporter_there_are_none(monkeypatch):
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    assert from_environment() is None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert from_environment() is None


def test_an_exporter_is_the_one_that_opentelemetry_s_variable_names(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    made = from_environment()
    assert made is not None
    made.close()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "pigeon")
    with pytest.raises(EnvironmentVariableError, match=r"OTEL_TRACES_EXPORTER: expected none or .*console.*'pigeon'"):
        from_environment()


def test_without_the_sdk_the_extra_is_named(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingExtraError, match=r"vhead\[telemetry\]"):
        from_environment()
