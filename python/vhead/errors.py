"""Every exception class of the package; all of them survive pickling, as workers send them between processes."""


class VheadError(Exception):
    """Base of the package's own exceptions."""


class HeadError(VheadError, ValueError):
    """A head is missing, misnamed, misshapen or of an unknown kind."""


class HeadMismatchError(HeadError):
    """A checkpoint holds something like a head that does not fit; the message lists what was found and expected."""


class HeadFileError(HeadError):
    """A file that should hold a head is missing, truncated, malformed or hostile."""


class ReferenceModelError(VheadError, ValueError):
    """A reference model cannot be made as asked."""


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


class HeadNotFoundError(HeadError):
    """A trained head is needed and there is none."""


class EnvironmentVariableError(VheadError, ValueError):
    """An environment variable of this package holds something it cannot mean."""


class AdapterError(VheadError, ValueError):
    """An adapter is missing, malformed, of the wrong kind, or not what was asked for needs."""


class BodyMismatchError(VheadError, ValueError):
    """A checkpoint's weights are not the language model's that its configuration names."""


class MissingPackageError(VheadError, ImportError):
    """A package that is not among this one's own dependencies is needed and not installed."""


class GenerationError(VheadError, ValueError):
    """A way of generating from which values cannot be read off as asked."""


class ResumeError(VheadError, ValueError):
    """An unfinished output cannot be gone on with: its input or its settings are others now, or it is damaged."""


class BenchmarkError(VheadError, ValueError):
    """Something cannot be measured as asked: the device is not there or too small, or torch.compile does not work."""


class CudaError(VheadError, RuntimeError):
    """The CUDA driver or a device refused what was asked of it; what was asked for was not computed."""
