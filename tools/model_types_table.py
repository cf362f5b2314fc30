"""Writes `docs/model-types.md`: what holds for each model type of the installed transformers, found by running it.

Each batch of model types runs in a process of its own, so that one that crashes costs only itself; rows are kept in
`target/model-types`, and a second run goes on where the first one stopped.

    python -m tools.model_types_table            # examine what is missing, then write the table
    python -m tools.model_types_table --fresh    # examine everything again
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from tests.architectures.report import Row, examine
from tests.architectures.table import render
from tests.architectures.tiny import model_types

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "model-types.md"
BATCH = 25
SECONDS_PER_BATCH = 600


def main() -> int:
    """Runs the command."""
    arguments = parsed()
    if arguments.batch:
        return examine_batch(arguments.batch)
    kept = arguments.rows or ROOT / "target" / "model-types" / f"{transformers.__version__}.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        kept.unlink(missing_ok=True)
    rows = collect(kept)
    arguments.output.write_text(
        render(rows, transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])
    )
    failed = [row for row in rows if not row.holds]
    for row in failed:
        print(f"does not hold: {row}", file=sys.stderr)
    print(f"{arguments.output}: {len(rows)} model types, {len(failed)} that do not hold")
    return 1 if failed else 0


def parsed() -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--rows", type=Path, help="where rows are kept between runs")
    parser.add_argument("--fresh", action="store_true", help="examine everything again")
    parser.add_argument("--batch", nargs="+", metavar="TYPE:CLASS", help="examine these and print their rows as JSON")
    return parser.parse_args()


def collect(kept: Path) -> list[Row]:
    """A row for every model type, from the file or by examining it."""
    wanted = model_types()
    known = read(kept)
    missing = [key for key in wanted if key not in known]
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        run(batch, kept)
        crashed = [key for key in batch if key not in read(kept)]
        for key in crashed:
            run([key], kept)
        print(f"{start + len(batch)} of {len(missing)}", file=sys.stderr)
    known = read(kept)
    return [known.get(key, Row(*key, route="", cells={"forward": "the process died"})) for key in wanted]


def run(batch: list[tuple[str, str]], kept: Path) -> None:
    """Examines a batch in another process, whose rows are appended to the file as they come."""
    names = [f"{model_type}:{auto_class}" for model_type, auto_class in batch]
    with kept.open("a") as rows:
        command = [sys.executable, "-m", "tools.model_types_table", "--batch", *names]
        try:
            subprocess.run(
                command, cwd=ROOT, stdout=rows, stderr=subprocess.DEVNULL, timeout=SECONDS_PER_BATCH, check=False
            )
        except subprocess.TimeoutExpired:
            print(f"out of time: {' '.join(names)}", file=sys.stderr)


def examine_batch(names: list[str]) -> int:
    """Prints the rows of a batch, whatever else the models print."""
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in names:
        model_type, _, auto_class = name.partition(":")
        try:
            row = examine(model_type, auto_class)
        except Exception as error:
            row = Row(model_type, auto_class, route="", cells={"forward": f"{type(error).__name__}: {error}"[:300]})
        print(json.dumps(dataclasses.asdict(row)), file=stdout, flush=True)
    return 0


def read(kept: Path) -> dict[tuple[str, str], Row]:
    """The rows in the file; a line that a dying process left unfinished is none."""
    rows = {}
    for line in kept.read_text().splitlines() if kept.exists() else []:
        try:
            row = Row(**json.loads(line))
        except (TypeError, ValueError):
            continue
        rows[row.model_type, row.auto_class] = row
    return rows


if __name__ == "__main__":
    sys.exit(main())
