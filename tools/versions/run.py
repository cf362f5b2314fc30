"""Runs the tests in a world of pinned releases: `.venv/bin/python tools/versions/run.py oldest`.

A world is a file of pins beside this script. Its virtual environment is made once; then vhead's wheel is installed as a
user installs it, which must not move a pin; then the tests run against the wheel, not against the checkout. A line of
the outcome is added to `results.jsonl`.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORLDS = sorted(path.stem for path in HERE.glob("*.txt"))
RESULTS = HERE / "results.jsonl"
REPORTED = ("torch", "transformers", "numpy", "safetensors", "huggingface-hub", "trl", "peft", "accelerate", "pyarrow")

# The source tree, its documents and the table of architectures are the same in every world.
LEFT_OUT = ("test_architecture.py", "test_readme.py", "test_requirements.py", "architectures")
# What old releases warn about themselves.
IGNORED_WARNINGS = (
    "default:`torch.cpu.amp.autocast(args...)` is deprecated:FutureWarning",
    "default:At pre-dispatch tracing:UserWarning",
)
CALM = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def main() -> None:
    """Makes the world, installs the wheel, runs the tests, records the outcome."""
    arguments, pytest_arguments = parser().parse_known_args()
    python = environment(arguments.environments / arguments.world, HERE / f"{arguments.world}.txt")
    before = freeze(python)
    install(python, arguments.wheel or build(arguments.environments / "wheels"))
    moved = sorted(before ^ freeze(python))
    if moved:
        sys.exit(f"installing vhead moved: {', '.join(moved)}")
    print(f"{arguments.world}: vhead is installed and moved none of {len(before)} packages", flush=True)
    outcome = run_tests(python, pytest_arguments)
    if not pytest_arguments:
        record(arguments.world, before, outcome)
    sys.exit(outcome["exit_code"])


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know is pytest's."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("world", choices=WORLDS)
    result.add_argument("--environments", type=Path, default=ROOT / "dist" / "worlds", help="where worlds are kept")
    result.add_argument("--wheel", type=Path, help="a wheel of vhead; without one, it is built from the checkout")
    return result


def environment(folder: Path, pins: Path) -> Path:
    """The Python of a world, which is made if need be."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        uv("venv", "--python", sys.executable, str(folder))
    uv("pip", "install", "--python", str(python), "--requirement", str(pins))
    uv("pip", "uninstall", "--python", str(python), "vhead")
    return python


def build(folder: Path) -> Path:
    """Builds the wheel from the checkout, with the maturin of this script's environment."""
    command = [sys.executable, "-m", "maturin", "build", "--release", "--locked", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return max(folder.glob("vhead-*.whl"), key=lambda path: path.stat().st_mtime)


def install(python: Path, wheel: Path) -> None:
    """Installs the wheel with its command line and Parquet, whose requirements uv may add but should find."""
    uv("pip", "install", "--python", str(python), f"{wheel.absolute()}[cli,data]")


def freeze(python: Path) -> set[str]:
    """Every package but vhead, with its version."""
    lines = uv("pip", "freeze", "--python", str(python)).splitlines()
    return {line for line in lines if not line.lower().startswith("vhead")}


def uv(*arguments: str) -> str:
    """Runs uv, and returns what it printed on its standard output; its messages are for the reader."""
    command = [sys.executable, "-m", "uv", "--quiet", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def run_tests(python: Path, pytest_arguments: list[str]) -> dict[str, int]:
    """Runs the tests against the installed wheel, and counts them."""
    ignored = [word for name in LEFT_OUT for word in ("--ignore", f"tests/{name}")]
    warnings = [word for entry in IGNORED_WARNINGS for word in ("-W", entry)]
    command = [python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *ignored, *warnings, *pytest_arguments]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=kept | CALM, stdout=pipe, text=True) as tests:
        last = ""
        for last in tests.stdout or ():
            print(last, end="", flush=True)
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return {"exit_code": tests.returncode, **counts}


def record(world: str, packages: set[str], outcome: dict[str, int]) -> None:
    """Adds a line to the results."""
    versions = dict(package.split("==") for package in packages if "==" in package)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True)
    line = {
        "world": world,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {name: versions[name] for name in REPORTED if name in versions},
        **outcome,
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
