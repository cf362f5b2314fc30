"""What Prometheus is told."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vhead.serve.batching import BatchReport

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SHARES = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("vhead_requests", "Answered requests", ["route", "status"], registry=registry)
        self._latency = Histogram(
            "vhead_request_seconds", "From a request to its answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self._cancelled = Counter("vhead_cancelled_requests", "Requests whose client went away", registry=registry)
        self._rollouts = Counter("vhead_rollouts", "Scored rollouts", registry=registry)
        self._tokens = Counter("vhead_tokens", "Scored tokens, prompts included", registry=registry)
        self._computed = Counter(
            "vhead_computed_tokens", "Tokens that went through the model: shared ones once", registry=registry
        )
        self._batch_seconds = Histogram("vhead_batch_seconds", "Time of a batch", buckets=_SECONDS, registry=registry)
        self._waited = Histogram(
            "vhead_queue_seconds", "Wait of a batch's oldest request", buckets=_SECONDS, registry=registry
        )
        self._fill = Histogram(
            "vhead_batch_fill", "Tokens of a batch, as a share of its room", buckets=_SHARES, registry=registry
        )
        self._step = Gauge(
            "vhead_weights_step", "The step of the weights that are served", ["model"], registry=registry
        )

    def watch(self, queued_requests: Callable[[], int], queued_tokens: Callable[[], int]) -> None:
        """Shows a queue as it is whenever somebody asks."""
        gauges = (("requests", "Requests", queued_requests), ("tokens", "Tokens of rollouts", queued_tokens))
        for unit, what, value in gauges:
            Gauge(f"vhead_queued_{unit}", f"{what} that wait", registry=self._registry).set_function(value)

    def watch_step(self, model: str, step: Callable[[], int | None]) -> None:
        """Shows the step of a model's weights as it is whenever somebody asks; NaN where nobody knows."""

        def shown() -> float:
            found = step()
            return float("nan") if found is None else found

        self._step.labels(model).set_function(shown)

    def batch(self, report: BatchReport) -> None:
        """Counts a batch."""
        self._rollouts.inc(report.rollouts)
        self._tokens.inc(report.tokens)
        self._computed.inc(report.computed_tokens)
        self._batch_seconds.observe(report.seconds)
        self._waited.observe(report.waited_s)
        self._fill.observe(report.fill)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def cancelled(self) -> None:
        """Counts a request whose client went away."""
        self._cancelled.inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
