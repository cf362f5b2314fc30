"""Following a trainer's weights between two batches."""

import logging
import time
from pathlib import Path

from torch import nn

from vhead.errors import SyncError, SyncStepError
from vhead.scoring.options import ScorerOptions
from vhead.sync import Follower

logger = logging.getLogger("vhead")

# The step of the weights that a scorer was made with.
OWN_WEIGHTS = -1
_PAUSE_S = 0.05


class Following:
    """Keeps a model's weights those that a publisher published last.

    Args:
        directory: The publisher's directory.
        options: The scorer's; of them `min_step`, `patience` and `share_weights`.
    """

    def __init__(self, directory: str | Path, options: ScorerOptions) -> None:
        self._follower = Follower(directory, share_weights=options.get("share_weights", False))
        self._min_step = options.get("min_step")
        self._patience = options.get("patience") or 0.0
        self._refused = ""

    @property
    def step(self) -> int:
        """The step of the model's weights."""
        step = self._follower.step
        return OWN_WEIGHTS if step is None else step

    def refresh(self, model: nn.Module) -> bool:
        """Brings the newest weights into the model; whether there were new ones.

        Raises:
            SyncStepError: There are none of `min_step` or later, and none have come within `patience`.
        """
        until = time.monotonic() + self._patience
        changed = self._apply(model)
        while self._min_step is not None and self.step < self._min_step:
            if time.monotonic() >= until:
                found = "none" if self.step == OWN_WEIGHTS else f"step {self.step}"
                raise SyncStepError(
                    f"min_step: expected weights of step {self._min_step} or later in {self._follower.directory}, "
                    f"got {found}; a longer patience waits for them"
                )
            time.sleep(_PAUSE_S)
            changed = self._apply(model) or changed
        return changed

    def _apply(self, model: nn.Module) -> bool:
        try:
            return self._follower.apply(model) is not None
        except SyncError as error:
            # The weights are still the old ones, and the scores say so.
            if str(error) != self._refused:
                self._refused = str(error)
                logger.warning("%s; scoring goes on with the weights of step %d", error, self.step)
            return False
