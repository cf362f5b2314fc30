"""Where attackers write."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def quick_folder(tmp_path):
    """A folder in memory where there is one: what is raced for is names, not the disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
