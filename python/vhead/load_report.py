"""Keeps transformers from reporting a value head's own tensors as unexpected while their body is loaded."""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGER = "transformers.modeling_utils"
_TABLE_STATUS = re.compile(r"\b(?:UNEXPECTED|MISSING|MISMATCH|CONVERSION)\b")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def quiet_about(tensor_root: str) -> Iterator[None]:
    """Drops this thread's load reports that are about tensors below `tensor_root` and about nothing else.

    A filter on transformers' own logger does it, for as long as the block runs. A report that has any other row is
    shown in full.
    """
    report_filter = _ReportFilter(tensor_root)
    logger = logging.getLogger(_LOGGER)
    logger.addFilter(report_filter)
    try:
        yield
    finally:
        logger.removeFilter(report_filter)


class _ReportFilter(logging.Filter):
    def __init__(self, tensor_root: str) -> None:
        super().__init__()
        self._root = tensor_root
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        subjects = _reported_tensors(_ANSI.sub("", record.getMessage()))
        return not subjects or not all(self._root in re.split(r"[.{]", name) for name in subjects)


def _reported_tensors(message: str) -> list[str]:
    """The tensors that a load report is about: the rows of transformers 5's table or the list of transformers 4."""
    if "LOAD REPORT" in message:
        rows = (line for line in message.splitlines() if "|" in line and _TABLE_STATUS.search(line.partition("|")[2]))
        return [row.partition("|")[0].strip() for row in rows]
    if message.startswith("Some weights of the model checkpoint") and "were not used" in message:
        return re.findall(r"'([^']+)'", message.partition("[")[2].partition("]")[0])
    return []
