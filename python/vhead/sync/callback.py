"""Publishing from transformers' `Trainer`."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vhead.sync.publisher import Publisher


class PublishCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Publishes the model's weights while transformers' `Trainer` trains it.

    Args:
        directory: Where followers look.
        every: Steps of the optimiser between two publications; the last step is published as well.
        **options: Those of `Publisher`.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(self, directory: str | Path, *, every: int = 1, **options: Any) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        self._every = every
        self._publisher = Publisher(directory, **options)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Publishes where it is time to."""
        if state.global_step % self._every == 0:
            self._publish(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Publishes the last weights."""
        if self._publisher.step != state.global_step:
            self._publish(state, model)

    def _publish(self, state: Any, model: Any) -> None:
        # Of models that are copies of each other, one publishes; of one that is sharded, all take part.
        sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        if state.is_world_process_zero or sharded:
            self._publisher.publish(model, step=state.global_step, metadata={"epoch": state.epoch})
