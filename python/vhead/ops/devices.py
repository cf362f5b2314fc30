"""What runs on which device."""

from vhead import _native
from vhead.ops.dispatch import SETTINGS


def backends() -> dict[str, dict[str, object]]:
    """What runs where.

    Returns:
        For each device type with kernels of this package (`"cpu"`), which ones and how they run; under
        `"other devices"` what the rest use; under `"build"` what the extension is.
    """
    table: dict[str, dict[str, object]] = {}
    for row in _native.backends():
        name = str(row.pop("device"))
        table[name] = {"kernel": "plain torch" if SETTINGS.plain_torch else "native", **row}
    return {**table, "other devices": {"kernel": "plain torch"}, "build": {**_native.build_info()}}
