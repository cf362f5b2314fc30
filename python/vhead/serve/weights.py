"""The weights that are served: of which step they are, and how newer and older ones take their place."""

import logging
import time
from contextlib import suppress
from pathlib import Path

from torch import nn

from vhead.errors import PublicationMissingError, RequestError, SyncError
from vhead.sync import Follower, publications

logger = logging.getLogger("vhead.serve")

# What scores say of weights that a model was loaded with.
OWN_WEIGHTS = -1
# A publication that was refused is not read again before every batch.
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
_NOTHING_YET = "nothing has been published there yet; until then the weights that the model was loaded with are served"


class Weights:
    """The weights of a model, which may follow what a trainer publishes.

    All but `about` is called in the thread that scores, between two batches.

    Args:
        model: The model.
        step: The training step of its own weights, where that is known.
        directory: Where a `vhead.sync.Publisher` publishes; None: the weights stay what they are.

    Attributes:
        own_step: The step of its own weights, as given.
    """

    def __init__(self, model: nn.Module, step: int | None = None, directory: str | Path | None = None) -> None:
        self._model = model
        self.own_step = step
        self._directory = directory
        self._follower = None if directory is None else Follower(directory)
        self._pinned = False
        self._problem = ""
        self._pause_s, self._again = 0.0, 0.0

    @property
    def step(self) -> int | None:
        """The step of the weights, or None where nobody knows."""
        published = None if self._follower is None else self._follower.step
        return self.own_step if published is None else published

    @property
    def stamp(self) -> int:
        """The step as scores state it."""
        published = None if self._follower is None else self._follower.step
        return OWN_WEIGHTS if published is None else published

    @property
    def digest(self) -> str | None:
        """The digest that their publication states; None for the weights that the model was loaded with."""
        publication = None if self._follower is None else self._follower.publication
        return None if publication is None else publication.digest

    @property
    def follows(self) -> bool:
        """Whether there is a directory whose publications take their place."""
        return self._follower is not None

    def refresh(self) -> None:
        """Brings the newest weights in, unless others were asked for; what is refused is said and left out."""
        if self._follower is None or self._pinned or time.monotonic() < self._again:
            return
        with suppress(SyncError):
            self._apply(self._follower)

    def reload(self) -> None:
        """Brings the newest weights in, and from now on whatever is published.

        Raises:
            RequestError: There is no directory, or the publication is refused; the weights are as they were.
        """
        follower = self._followed()
        self._pinned = False
        try:
            self._apply(follower)
        except SyncError as error:
            raise RequestError(f"the weights are as they were: {self._without_path(error)}", 409) from error

    def roll_back(self, step: int | None = None) -> None:
        """Brings older weights in, which stay until `reload`.

        Args:
            step: Which; None: the newest ones before those that are served.

        Raises:
            RequestError: There are none of this step, or they are refused; the weights are as they were.
        """
        follower = self._followed()
        try:
            steps = self._steps(follower)
            wanted = self._before(steps) if step is None else step
            if wanted not in steps:
                raise RequestError(f"step: expected one of {_listed(steps)}, got {wanted}", 404)
            follower.apply(self._model, step=wanted)
        except SyncError as error:
            status = 404 if isinstance(error, PublicationMissingError) else 409
            raise RequestError(f"the weights are as they were: {self._without_path(error)}", status) from error
        self._pinned, self._problem = True, ""
        logger.info("rolled back to the weights of step %s", self.step)

    def about(self) -> dict[str, object]:
        """What `GET /weights` says."""
        steps: list[int] = []
        if self._follower is not None:
            with suppress(SyncError):
                steps = self._steps(self._follower)
        return {
            "step": self.step,
            "digest": self.digest,
            "follows": self.follows,
            "pinned": self._pinned,
            "published_steps": steps,
            "problem": self._problem or None,
        }

    def _followed(self) -> Follower:
        if self._follower is None:
            raise RequestError("this model follows no directory; start the server with --follow", 409)
        return self._follower

    def _apply(self, follower: Follower) -> None:
        try:
            step = follower.apply(self._model)
        except SyncError as error:
            self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            self._again = time.monotonic() + self._pause_s
            if (problem := self._without_path(error)) != self._problem:
                self._problem = problem
                logger.warning("%s; the weights of step %s are served on", error, self.step)
            raise
        self._pause_s, self._again = 0.0, 0.0
        if follower.publication is None:
            # A trainer may begin later; a name that is written wrong looks the same.
            if self._problem != _NOTHING_YET:
                self._problem = _NOTHING_YET
                logger.warning("%s: %s", self._directory, _NOTHING_YET)
            return
        self._problem = ""
        if step is not None:
            logger.info("serves the weights of step %d", step)

    def _without_path(self, error: SyncError) -> str:
        """What went wrong, without where on the disk: it goes to clients."""
        directory = str(self._followed().directory)
        return str(error).replace(f"{directory}/", "").replace(directory, "the directory")

    def _steps(self, follower: Follower) -> list[int]:
        return [entry.step for entry in publications(follower.directory) if entry.publication is not None]

    def _before(self, steps: list[int]) -> int:
        older = [step for step in steps if self.step is not None and step < self.step]
        if not older:
            raise RequestError(f"expected weights before those of step {self.step}, found {_listed(steps)}", 404)
        return older[-1]


def _listed(steps: list[int]) -> str:
    return f"the published steps {', '.join(map(str, steps[-20:]))}" if steps else "none"
