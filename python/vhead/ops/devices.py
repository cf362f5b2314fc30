"""What runs on which device."""

from vhead import _native
from vhead.ops.dispatch import SETTINGS


def backends() -> dict[str, dict[str, object]]:
    """What runs where.

    This asks the CUDA driver, where there is one, for its devices: from then on, as with `torch.cuda.is_available()`, a
    forked child cannot use CUDA. It makes no context and loads no kernel.

    Returns:
        For each device type with kernels of this package (`"cpu"`, `"cuda"`), which ones and how they run, and where
        plain torch runs instead of them, the reason; under `"other devices"` what the rest use; under `"build"` what
        the extension is.
    """
    rows = _native.backends()
    table = {str(row.pop("device")): _chosen(row) for row in rows}
    return {**table, "other devices": {"kernel": "plain torch"}, "build": {**_native.build_info()}}


def _chosen(row: dict[str, object]) -> dict[str, object]:
    """A row of the table: which kernel runs, then the facts."""
    if SETTINGS.plain_torch:
        return {"kernel": "plain torch", "reason": "VHEAD_PLAIN_TORCH=1", **row}
    return {"kernel": "native" if row.pop("available", True) else "plain torch", **row}
