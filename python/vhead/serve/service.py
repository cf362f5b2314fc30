"""What a server does, whatever the protocol: its models, their queue, and the thread that tokenises."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from vhead.errors import RequestError, ServerStoppingError
from vhead.scoring.scorer import Scorer
from vhead.scoring.scores import Scores
from vhead.serve.batching import Batcher, BatchReport, QueueLimits
from vhead.serve.limits import RequestLimits
from vhead.serve.metrics import Metrics
from vhead.serve.models import Prepared, ScorerBatches, ServedModel
from vhead.serve.tracing import Tracing
from vhead.serve.weights import Weights

Result = TypeVar("Result")

# So many fill the rows of the model's batches evenly, and more would make others wait longer.
_BUDGETS_PER_BATCH = 4
# How often a server that has nothing to do looks for new weights.
_LOOK_S = 0.5


class Service:
    """The models that are served, their queue, and the thread that tokenises.

    Args:
        scorer: The model that requests get which name none.
        names: What clients may call it; the first one is what answers call it.
        queue: How much may wait; None: batches of four times the scorer's token budget, otherwise the defaults.
        limits: What a request may have.
        step: The training step of the weights, where that is known.
        follow: A directory whose publications take the place of its weights.
        tracing: Told of requests and batches; None: nobody is.

    Attributes:
        limits: As given.
        tracing: As given.
        models: The models, by each of their names.
        metrics: What was counted.
        batcher: The queue.
    """

    def __init__(
        self,
        scorer: Scorer,
        names: Sequence[str],
        *,
        queue: QueueLimits | None = None,
        limits: RequestLimits | None = None,
        step: int | None = None,
        follow: str | Path | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.tracing = tracing
        self.limits = limits or RequestLimits()
        self.metrics = Metrics()
        self.models: dict[str, ServedModel] = {}
        queue = queue or QueueLimits(batch_tokens=batch_tokens(scorer))
        self.batcher = Batcher(ScorerBatches(self.models), queue, on_batch=self._computed)
        self.metrics.watch(lambda: self.batcher.queued_requests, lambda: self.batcher.queued_tokens)
        # Tokenizers of transformers are not made for several threads at once.
        self._reader = ThreadPoolExecutor(1, "vhead-reader")
        self._closing = threading.Event()
        self._looks = threading.Thread(target=self._look_for_weights, name="vhead-weights", daemon=True)
        self.add(scorer, names, step=step, follow=follow)

    def add(
        self,
        scorer: Scorer,
        names: Sequence[str],
        *,
        step: int | None = None,
        follow: str | Path | None = None,
        weights: Weights | None = None,
    ) -> ServedModel:
        """Serves one more model.

        Args:
            scorer: The model.
            names: What clients may call it; the first one is what answers call it.
            step: The training step of the weights, where that is known.
            follow: A directory whose publications take the place of its weights.
            weights: Those of a model of which this one is another head, in place of the two above.

        Raises:
            ValueError: Another model has one of the names.
        """
        if taken := self.models.keys() & set(names):
            raise ValueError(f"names: expected a name for each model, got {', '.join(sorted(taken))} twice")
        model = ServedModel(scorer, names, weights or Weights(scorer.model, step, follow), self.limits)
        self.models |= dict.fromkeys(names, model)
        self.metrics.watch_step(model.name, lambda: model.weights.step)
        if model.weights.follows:
            self.batcher.call(model.weights.refresh).result()
            if not self._looks.is_alive():
                self._looks.start()
        return model

    async def read(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Runs what takes time and is not the model's in a thread of its own, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work, *arguments)

    def model(self, name: str | None = None) -> ServedModel:
        """The model that a client calls by a name; None: the first one.

        Raises:
            RequestError: None is called that.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise RequestError(f"model: expected one of {', '.join(self.models)}, got {name[:100]!r}", 404)
        return self.models[name]

    def submit(self, prepared: Prepared, client: str, name: str = "") -> Future[Scores]:
        """Queues what was prepared.

        Args:
            prepared: It.
            client: Who asks.
            name: The request's id.

        Raises:
            ServerBusyError: There is no room in the queue.
            ServerStoppingError: The server is stopping.
        """
        model = prepared.model.name
        return self.batcher.submit(prepared.rollouts, prepared.asked, client=client, model=model, name=name)

    def close(self, timeout_s: float | None = None) -> bool:
        """Scores what waits and ends the threads; whether all that was accepted has been scored."""
        self._closing.set()
        done = self.batcher.stop(timeout_s)
        self._reader.shutdown()
        if self.tracing is not None:
            self.tracing.close()
        return done

    def _computed(self, report: BatchReport) -> None:
        self.metrics.batch(report)
        if self.tracing is not None:
            self.tracing.batch(report)

    def _look_for_weights(self) -> None:
        with suppress(ServerStoppingError):
            while not self._closing.wait(_LOOK_S):
                for model in set(self.models.values()):
                    self.batcher.call(model.weights.refresh)


def batch_tokens(scorer: Scorer) -> int:
    """How many tokens a batch takes through a scorer's model, where nobody says."""
    return scorer.token_budget * _BUDGETS_PER_BATCH
