"""trl's value-head classes, for code that imports them from trl: every path from trl 0.8 to 1.12, any trl or none.

`install()` in the program, before or after it imports trl; or `python -m vhead.compat.trl` in place of `python` for a
program that cannot change.
"""

from vhead.compat.trl.installation import Installation, Status, install, status, uninstall

__all__ = ["Installation", "Status", "install", "status", "uninstall"]
