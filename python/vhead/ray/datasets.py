"""Whole data sets of Ray Data: actors that score their batches, and processors in the form of `ray.data.llm`."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vhead.errors import MissingExtraError
from vhead.ray.batches import ERROR_COLUMN, BatchScorer

RowFunction = Callable[[dict[str, Any]], Any]
Concurrency = int | tuple[int, int]

_BATCH_SIZE = 256


def score_dataset(
    dataset: Any,
    model: str,
    *,
    batch_size: int = _BATCH_SIZE,
    concurrency: Concurrency = 1,
    resources: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Scores every row of a `ray.data.Dataset`, in as many actors as you want.

    An actor that dies is started anew, and what it had not handed over is scored again, so that each row is in the
    output once.

    Args:
        dataset: Rows with the fields that `BatchScorer` takes.
        model: A folder that every machine has, or a hub repository's id.
        batch_size: Rows that an actor takes at once. Rollouts of one prompt share their computation in a batch.
        concurrency: How many actors; two numbers: at least and at most, as there is work.
        resources: What Ray gives to each actor, such as `{"num_cpus": 8}` or `{"num_gpus": 1}`; any argument of
            `map_batches` for actors.
        **options: Those of `BatchScorer`.

    Returns:
        A `ray.data.Dataset`, computed when it is read.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError: `concurrency` or `batch_size` is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    return dataset.map_batches(
        BatchScorer,
        fn_constructor_kwargs={"model": model, **options},
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=_pool(concurrency),
        udf_modifying_row_count=False,
        **(resources or {}),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerProcessorConfig:
    """What a processor scores with; the names are those of `ray.data.llm`'s configurations.

    Attributes:
        model_source: A folder that every machine has, or a hub repository's id.
        scorer_kwargs: The other arguments of `BatchScorer`, such as `{"returns": ["reward"], "dtype": "bfloat16"}`.
        batch_size: Rows that an actor takes at once.
        concurrency: How many actors; two numbers: at least and at most.
        accelerator_type: The kind of GPU that each actor needs, such as `"H100"`; it then has one.
        runtime_env: The environment of the actors, as Ray takes it.
        resources: What else Ray gives to each actor, such as `{"num_cpus": 8}`.
        should_continue_on_error: Whether a row that cannot be scored stays in the output, with what is wrong with it in
            `__inference_error__`. Such rows do not go through `postprocess`.
    """

    model_source: str
    scorer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = _BATCH_SIZE
    concurrency: Concurrency = 1
    accelerator_type: str | None = None
    runtime_env: Mapping[str, Any] | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    should_continue_on_error: bool = False


class Processor:
    """Takes a data set through `preprocess`, the scorer and `postprocess`; it is called with a `ray.data.Dataset`."""

    def __init__(
        self,
        config: ScorerProcessorConfig,
        preprocess: RowFunction | None,
        postprocess: RowFunction | None,
        preprocess_map_kwargs: Mapping[str, Any] | None,
        postprocess_map_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.config = config
        self._before = preprocess, dict(preprocess_map_kwargs or {})
        self._after = postprocess, dict(postprocess_map_kwargs or {})

    def __call__(self, dataset: Any) -> Any:
        """The data set of what comes out, computed when it is read."""
        config = self.config
        preprocess, options = self._before
        if preprocess is not None:
            dataset = dataset.map(preprocess, **options)
        dataset = score_dataset(
            dataset,
            config.model_source,
            batch_size=config.batch_size,
            concurrency=config.concurrency,
            resources=_resources(config),
            should_continue_on_error=config.should_continue_on_error,
            **config.scorer_kwargs,
        )
        postprocess, options = self._after
        if postprocess is None:
            return dataset
        return dataset.map(_past_errors(postprocess) if config.should_continue_on_error else postprocess, **options)


def build_processor(
    config: ScorerProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """A processor of data sets, as `ray.data.llm.build_processor` builds them.

    Args:
        config: The model, and how many actors score with it.
        preprocess: Makes of each row one with the fields that `BatchScorer` takes; None: rows have them.
        postprocess: Makes of each row with its scores what comes out; None: all of it does.
        preprocess_map_kwargs: Arguments of `Dataset.map` for `preprocess`, such as `{"num_cpus": 0.5}`.
        postprocess_map_kwargs: The same for `postprocess`.

    Returns:
        What is called with a `ray.data.Dataset` and gives one, which is computed when it is read.
    """
    return Processor(config, preprocess, postprocess, preprocess_map_kwargs, postprocess_map_kwargs)


def _resources(config: ScorerProcessorConfig) -> dict[str, Any]:
    given = dict(config.resources)
    if config.runtime_env is not None:
        given["runtime_env"] = dict(config.runtime_env)
    if config.accelerator_type is not None:
        given = {"num_gpus": 1, **given, "accelerator_type": config.accelerator_type}
    return given


def _past_errors(postprocess: RowFunction) -> RowFunction:
    """`postprocess` for the rows that were scored; the others keep what they have."""

    def processed(row: dict[str, Any]) -> Any:
        return row if row[ERROR_COLUMN] else {**postprocess(row), ERROR_COLUMN: ""}

    return processed


def _pool(concurrency: Concurrency) -> Any:
    try:
        strategy = importlib.import_module("ray.data").ActorPoolStrategy
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    least, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    if not 1 <= least <= most:
        raise ValueError(f"concurrency: expected a number from 1 on, or two rising ones, got {concurrency!r}")
    return strategy(size=least) if least == most else strategy(min_size=least, max_size=most)
