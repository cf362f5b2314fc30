"""Every exception class of the package; all of them survive pickling, as workers send them between processes."""


class VheadError(Exception):
    """Base of the package's own exceptions."""


class HeadError(VheadError, ValueError):
    """A head is missing, misnamed, misshapen or of an unknown kind."""


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


class KernelPanicError(VheadError, RuntimeError):
    """A kernel failed inside: a defect of this package, never of the caller's arguments."""
