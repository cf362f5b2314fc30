"""What can be wrong with PTX, or with a launch of it."""


class PtxError(Exception):
    """Any of these."""


class PtxSyntaxError(PtxError):
    """Text that the parser does not understand."""


class UnknownInstructionError(PtxError):
    """An instruction whose meaning the interpreter does not know, or that promises no exact result."""


class LaunchError(PtxError):
    """Arguments or a grid that do not fit the kernel."""


class AccessError(PtxError):
    """An access outside every allocation, misaligned, of memory never written, or a write to an input."""


class RaceError(PtxError):
    """Two threads at one place in memory, one of them writing, with nothing that orders them."""


class BarrierError(PtxError):
    """A barrier that some threads of the block do not reach."""


class ShuffleError(PtxError):
    """A warp's exchange from which threads that its mask names are missing."""


class EndlessError(PtxError):
    """More instructions than the launch may take."""
