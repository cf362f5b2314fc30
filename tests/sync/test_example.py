"""The example: a trainer and two workers, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer_and_workers.py"


def test_two_workers_score_while_a_trainer_publishes(tmp_path):
    command = [sys.executable, EXAMPLE, "--steps", "3", "--directory", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "trainer: step 3" in done.stdout
    workers = [line for line in done.stdout.splitlines() if line.startswith("worker")]
    assert len(workers) == 2
    assert all("3: 8" in line for line in workers)
