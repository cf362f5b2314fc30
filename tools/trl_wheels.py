"""Tries vhead.compat.trl on the wheels of trl's releases and writes the table of docs/trl-import-paths.md.

    python tools/trl_wheels.py FOLDER

The wheels are installed below FOLDER, outside the repository and without their dependencies: they are imported beside
the torch and transformers that are installed here.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

from vhead.compat.trl import install, uninstall
from vhead.compat.trl.names import CAUSAL, NAMES, SUPPORTED, value_of

VERSIONS = (
    "0.8.6",
    "0.9.6",
    "0.11.4",
    "0.19.1",
    "0.24.0",
    "0.26.2",
    "0.27.0",
    "0.28.0",
    "0.29.0",
    "1.12.0",
    "1.13.0",
    "1.16.0",
)
PAGE = Path(__file__).parent.parent / "docs" / "trl-import-paths.md"
BEGIN, END = "<!-- tools/trl_wheels.py writes this table -->\n", "<!-- end of the table -->\n"
TRAINERS = (("trl", "PPOTrainer"), ("trl.experimental.ppo", "PPOTrainer"))


def resolve(module: str, name: str) -> object:
    """What is found under a name, or the error that the import ended in."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        return error


def namespaces() -> dict[str, dict[str, int]]:
    """The identity of everything that trl's loaded modules hold."""
    loaded = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "trl"}
    return {name: {key: id(value) for key, value in vars(module).items()} for name, module in loaded.items()}


def is_vheads(name: str, value: object) -> bool:
    """Whether a name leads to vhead; trl's tuple may keep trl's classes after vhead's."""
    if name == SUPPORTED:
        return isinstance(value, tuple) and value[:2] == value_of(name)
    return value is value_of(name)


def examine(*, late: bool) -> dict[str, object]:
    """Counts, in this process, the names that lead somewhere before, while and after vhead's names are installed."""
    warnings.simplefilter("ignore")
    pairs = [(module, name) for module, names in NAMES.items() for name in names]
    own = sum(not isinstance(resolve(*pair), Exception) for pair in pairs) if late else 0
    if late:  # Lazy modules keep what was once asked for: ask for all of it before comparing.
        for pair in TRAINERS:
            resolve(*pair)
    before = namespaces()
    install()
    found = sum(is_vheads(name, resolve(module, name)) for module, name in pairs)
    trainer = next((t for pair in TRAINERS if not isinstance(t := resolve(*pair), AttributeError | ImportError)), None)
    problem = str(trainer).splitlines()[-1] if isinstance(trainer, Exception) else ""
    uninstall()
    after = {name: names for name, names in namespaces().items() if name in before}
    return {
        "own": own,
        "found": found,
        "names": len(pairs),
        "trainer": problem or ("none" if trainer is None else "imports"),
        "restored": not late or after == before,
        "plain": not is_vheads(CAUSAL, resolve("trl", CAUSAL)),
    }


def fetch(number: str, folder: Path) -> Path:
    """Installs one wheel below the folder, unless it is there."""
    target = folder / number
    if not (target / "trl").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, f"trl=={number}"], check=True)
    return target


def survey(number: str, folder: Path) -> str:
    """The table's row of one release."""
    row = {}
    for way in ("early", "late"):
        environment = os.environ | {"PYTHONPATH": str(fetch(number, folder)), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--examine", way]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        row[way] = json.loads(done.stdout.splitlines()[-1])
    early, late = row["early"], row["late"]
    restored = "yes" if late["restored"] and early["plain"] and late["plain"] else "no"
    cells = (number, late["own"], early["found"], late["found"], restored, early["trainer"])
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def table(folder: Path) -> str:
    """The table of all releases."""
    names = sum(map(len, NAMES.values()))
    head = (
        f"transformers {version('transformers')}, torch {version('torch')}; {names} names.\n\n"
        "| trl | names of its own | vhead's, installed before | installed after | restored | its `PPOTrainer` |\n"
        "|---|---|---|---|---|---|\n"
    )
    return head + "".join(survey(number, folder) for number in VERSIONS)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--examine", choices=["early", "late"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.examine:
        print(json.dumps(examine(late=options.examine == "late")))
    elif options.folder is None:
        parser.error("FOLDER is required")
    else:
        text = PAGE.read_text()
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        PAGE.write_text(text[:start] + table(options.folder) + text[end:])


if __name__ == "__main__":
    main()
