"""Every exception class of the package; all of them survive pickling, as workers send them between processes.

`loading` is the gate through which other packages load what somebody else wrote.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).parent
_LONGEST_REASON = 500


class VheadError(Exception):
    """Base of the package's own exceptions."""


class HeadError(VheadError, ValueError):
    """A head is missing, misnamed, misshapen or of an unknown kind."""


class HeadMismatchError(HeadError):
    """A checkpoint holds something like a head that does not fit; the message lists what was found and expected."""


class LoadError(VheadError, OSError, ValueError):
    """Another package could not load a folder or a file. The message names it; `__cause__` is the original error."""


class HeadFileError(HeadError):
    """A file that should hold a head is missing, truncated, malformed or hostile."""


class ReferenceModelError(VheadError, ValueError):
    """A reference model cannot be made with these arguments."""


class RecordError(VheadError, ValueError):
    """A record of the input cannot be scored.

    Attributes:
        record: Which record: its id, or its position in the input.
        field: Which field of it.
    """

    def __init__(self, message: str, *, record: str | int | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.record = record
        self.field = field


class AllocationError(VheadError, MemoryError):
    """There is no memory for what an argument's sizes ask for, such as a broadcast array that is to be written out."""


class KernelPanicError(VheadError, RuntimeError):
    """A kernel failed inside: a defect of this package, never of the caller's arguments."""


class FieldError(RecordError):
    """One field of a record holds something that cannot be scored.

    Attributes:
        record: Which record: its id, or its position in the input; None while it has no name yet.
        field: Which field of it.
        expected: What would have been right.
        got: What came instead.
    """

    def __init__(self, record: str | int | None, field: str, *, expected: str, got: str) -> None:
        name = "" if record is None else f"record {record!r}: " if isinstance(record, int) else f"{record}: "
        super().__init__(f"{name}{field}: expected {expected}, got {got}", record=record, field=field)
        self.expected = expected
        self.got = got

    def of(self, record: str | int) -> "FieldError":
        """The same error about a record that has a name now."""
        return FieldError(record, self.field or "", expected=self.expected, got=self.got)

    def __reduce__(self) -> tuple[object, ...]:
        return _field_error, (self.record, self.field, self.expected, self.got)


def _field_error(record: str | int | None, field: str, expected: str, got: str) -> FieldError:
    return FieldError(record, field, expected=expected, got=got)


class FileFormatError(VheadError, ValueError):
    """A file does not hold what its name promises, or cannot hold what is to be written."""


class MissingExtraError(VheadError, ImportError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; it comes with: pip install 'vhead[{extra}]'")
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[object, ...]:
        return MissingExtraError, (self.package, self.extra)


class MissingFieldError(VheadError, AttributeError):
    """A field of scores is read that was not asked for.

    Attributes:
        field: Which field.
        present: The fields that there are.
    """

    def __init__(self, field: str, present: tuple[str, ...]) -> None:
        super().__init__(
            f"{field}: expected one of the fields that were computed ({', '.join(present)}); "
            "ask for more in `returns` when you score"
        )
        self.field = field
        self.present = present

    def __reduce__(self) -> tuple[object, ...]:
        return MissingFieldError, (self.field, self.present)


class HeadNotFoundError(HeadError):
    """A trained head is needed and there is none."""


class EnvironmentVariableError(VheadError, ValueError):
    """An environment variable of this package has a value that is not allowed."""


class AdapterError(VheadError, ValueError):
    """An adapter is missing, malformed, of the wrong kind, or not one that the call can use."""


class BodyMismatchError(VheadError, ValueError):
    """A checkpoint's weights are not those of the language model that its configuration names."""


class MissingPackageError(VheadError, ImportError):
    """A package that is not among this one's own dependencies is needed and not installed."""


class GenerationError(VheadError, ValueError):
    """Values cannot be read off with the way of generating that was asked for."""


class ResumeError(VheadError, ValueError):
    """An unfinished output cannot be continued: its input or its settings have changed, or it is damaged."""


class InputChangedError(ResumeError):
    """The input is not the one that the finished records are of. The message does not name it: its reader can."""


class OutputError(VheadError, OSError):
    """An output cannot be written under its name: something is there already, or another run is writing it."""


class OutputBusyError(OutputError):
    """Another run is writing this output."""


class GradientError(VheadError, ArithmeticError):
    """A gradient is not finite.

    Attributes:
        rollouts: Whose it is, by their places among those that were given.
    """

    def __init__(self, message: str, *, rollouts: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rollouts = rollouts

    def __reduce__(self) -> tuple[object, ...]:
        return _gradient_error, (str(self), self.rollouts)


def _gradient_error(message: str, rollouts: tuple[int, ...]) -> GradientError:
    return GradientError(message, rollouts=rollouts)


class FitError(VheadError, ValueError):
    """A head cannot be fitted to these rollouts and targets, or not in this way."""


class BenchmarkError(VheadError, ValueError):
    """A measurement is not possible: the device is not there or too small, or torch.compile does not work."""


class RequestError(VheadError):
    """A server refuses a request.

    Attributes:
        status: The status code of HTTP.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        return RequestError, (str(self), self.status)


class ServerError(VheadError):
    """A server refuses what a client asks, or does not answer.

    Attributes:
        status: The status code of HTTP; None: there was no answer.
        request_id: By which the server's log names the request.
    """

    def __init__(self, message: str, *, status: int | None = None, request_id: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.request_id = request_id


class ServerBusyError(VheadError):
    """A server's queue has no room for one more request.

    Attributes:
        retry_after: Seconds after which there will probably be room.
    """

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return ServerBusyError, (str(self), self.retry_after)


class ServerStoppingError(VheadError):
    """A server answers what it has accepted, takes nothing more, and then stops."""


class CudaError(VheadError, RuntimeError):
    """The CUDA driver or a device refused a call, so the result was not computed."""


class SyncError(VheadError):
    """Weights could not be handed over. The weights in use are those from before, bit for bit."""


class PublicationError(SyncError, ValueError):
    """A publication of weights is damaged, hostile, or of another release; nothing of it was installed."""


class WrongBaseError(PublicationError):
    """A publication holds changes to weights that the follower does not have and cannot get."""


class PublicationMismatchError(PublicationError):
    """A publication's tensors are not those of the model; the message names them."""


class PublicationMissingError(SyncError, FileNotFoundError):
    """A directory or a publication is not there, or was removed while it was read."""


class PublisherConflictError(SyncError, RuntimeError):
    """Another publisher publishes in the same directory."""


class SyncStepError(SyncError, ValueError):
    """A step is not above the last one, or not the one that was waited for."""


class SyncFileError(SyncError, OSError):
    """The file system refused a call: the disk is full, or a directory cannot be written."""


@contextmanager
def loading(what: str | Path) -> Iterator[None]:
    """Turns whatever another package raises while it loads something into a `LoadError` of one line.

    This package's own exceptions pass as they are, and so does what its own code raises by mistake, which a message
    about a file would hide. A panic of a Rust extension, which is no `Exception`, is an error like any other.

    Args:
        what: What is loaded, for the message: a folder, a file, a hub repository's id.

    Raises:
        LoadError: Another package raised something.
    """
    try:
        yield
    except (VheadError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if _is_own_mistake(error):
            raise
        raise LoadError(f"{what}: cannot be loaded: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What another package says, or in our own words where it would send somebody to another package's switches."""
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return (
            "it needs Python code that comes with it; read that code, and if you trust it, pass "
            "trust_remote_code=True, or --trust-remote-code on the command line"
        )
    return in_one_line(error)


def _is_own_mistake(error: BaseException) -> bool:
    """Whether an exception of Python's own was raised by a line of this package, not by what the line called."""
    if isinstance(error, OSError) or type(error).__module__ != "builtins":
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    # Python asks `__getattr__` for what an object lacks: who asked has made the mistake.
    raisers = [frame.f_code for frame in frames if frame.f_code.co_name != "__getattr__"]
    return bool(raisers) and _PACKAGE in Path(raisers[-1].co_filename).parents


def in_one_line(error: BaseException) -> str:
    """The kind of an error and what it says, on one line that is short enough for a terminal."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Names the file in errors of the operating system, which name one only where it was opened."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
