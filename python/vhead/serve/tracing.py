"""Traces of requests and batches, for who has an exporter of OpenTelemetry's."""

import os
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from vhead.errors import EnvironmentVariableError, MissingExtraError
from vhead.serve.batching import BatchReport

_EXPORTER = "OTEL_TRACES_EXPORTER"


class Tracing:
    """A span for each request, and one for each batch, which is linked to the requests that it had rollouts of.

    Args:
        provider: A `TracerProvider` of OpenTelemetry's SDK, which is shut down at the end.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry import propagate, trace  # an optional dependency

        self._provider, self._trace, self._propagate = provider, trace, propagate
        self._tracer = provider.get_tracer("vhead.serve")
        self._open: dict[str, Any] = {}

    @contextmanager
    def request(self, scope: MutableMapping[str, Any], headers: Mapping[str, str]) -> Iterator[None]:
        """A request, in the trace of whoever sent it; what its state has when it ends becomes attributes."""
        name, state = scope["state"]["request_id"], scope["state"]
        span = self._tracer.start_span(
            scope["method"], context=self._propagate.extract(headers), kind=self._trace.SpanKind.SERVER
        )
        self._open[name] = span
        try:
            yield
        finally:
            self._open.pop(name, None)
            route = getattr(scope.get("route"), "path", "none")
            span.update_name(f"{scope['method']} {route}")
            span.set_attributes({"http.request.method": scope["method"], "http.route": route, "vhead.request_id": name})
            for what in ("rollouts", "tokens"):
                if what in state:
                    span.set_attribute(f"vhead.{what}", state[what])
            span.set_attribute("http.response.status_code", state.get("status", 500))
            span.end()

    def batch(self, report: BatchReport) -> None:
        """A batch that has just been computed."""
        spans = [span for name in report.names if (span := self._open.get(name)) is not None]
        for span in spans:
            span.set_attribute("vhead.batch", report.number)
        now = time.time_ns()
        links = [self._trace.Link(span.get_span_context()) for span in spans]
        span = self._tracer.start_span("batch", links=links, start_time=now - int(report.seconds * 1e9))
        attributes = ("number", "rollouts", "requests", "tokens", "computed_tokens", "fill", "waited_s")
        span.set_attributes({f"vhead.batch.{name}": getattr(report, name) for name in attributes})
        span.end(now)

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()


def from_environment() -> Tracing | None:
    """What OpenTelemetry's variable `OTEL_TRACES_EXPORTER` asks for, with the settings of the others; None: nothing.

    Raises:
        EnvironmentVariableError: No installed package has the exporter.
        MissingExtraError: OpenTelemetry's SDK is not installed.
    """
    name = os.environ.get(_EXPORTER, "none").strip()
    if name in ("", "none"):
        return None
    try:
        from opentelemetry.sdk.resources import Resource  # an optional dependency
        from opentelemetry.sdk.trace import TracerProvider  # as above
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # as above
    except ImportError as error:
        raise MissingExtraError("opentelemetry-sdk", "telemetry") from error
    exporters = {entry.name: entry for entry in entry_points(group="opentelemetry_traces_exporter")}
    if name not in exporters:
        known = ", ".join(sorted(exporters))
        raise EnvironmentVariableError(f"{_EXPORTER}: expected none or an installed exporter ({known}), got {name!r}")
    service = os.environ.get("OTEL_SERVICE_NAME", "vhead")
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(exporters[name].load()()))
    return Tracing(provider)
