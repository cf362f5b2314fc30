"""The names of its dependencies that vhead uses, and whether the installed releases have them.

    python tools/versions/names.py            # run in the oldest world: writes oldest_names.json

Its test then tells, in any world and without old releases, when a line of code uses something that the oldest ones were
never seen to have. Arguments are not names: only the tests, run in that world, see those.
"""

import ast
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent.parent / "python" / "vhead"
RECORD = HERE / "oldest_names.json"
DEPENDENCIES = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy"}


def main() -> None:
    """Records the names that the installed releases have, and prints the others."""
    used = names_in_package()
    found = {name for name in used if exists(name)}
    RECORD.write_text(json.dumps(sorted(found), indent=2) + "\n", encoding="utf-8")
    for name in sorted(used - found):
        print(f"not in this world: {name}")


def names_in_package() -> set[str]:
    """Every dotted name of a dependency in vhead's sources."""
    return {name for path in PACKAGE.rglob("*.py") for name in names_in(path.read_text(encoding="utf-8"))}


def names_in(source: str) -> Iterator[str]:
    """The dotted names that a source imports from the dependencies, or reaches through what it imports."""
    tree = ast.parse(source)
    imported = dict(imports_of(tree))
    yield from imported.values()
    chains = (chain_of(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    yield from (".".join([imported[chain[0]], *chain[1:]]) for chain in chains if chain and chain[0] in imported)


def imports_of(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What each import of a dependency binds, and the dotted name that it stands for."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                whole = ((alias.asname or top(alias.name), alias) for alias in aliases)
                pairs = [(bound, alias.name if alias.asname else top(alias.name)) for bound, alias in whole]
            case ast.ImportFrom(module=str(module), names=aliases, level=0):
                pairs = [(alias.asname or alias.name, f"{module}.{alias.name}") for alias in aliases]
            case _:
                pairs = []
        yield from ((bound, name) for bound, name in pairs if top(name) in DEPENDENCIES)


def chain_of(node: ast.expr) -> list[str]:
    """`torch.nn.Linear` as its parts, or nothing for an attribute of an expression."""
    match node:
        case ast.Name(id=name):
            return [name]
        case ast.Attribute(value=value, attr=name) if chain := chain_of(value):
            return [*chain, name]
    return []


def top(name: str) -> str:
    """The package that a dotted name is in."""
    return name.partition(".")[0]


def exists(name: str) -> bool:
    """Whether a dotted name can be imported, or be reached from what can be."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


if __name__ == "__main__":
    main()
