"""The rules of the source tree. Each rule is a function from source to offences, tried on a bad example as well."""

import ast
import importlib
import inspect
import pickle
import pkgutil
import re
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vhead
from vhead.errors import VheadError

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "vhead"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A module imports from the layers above its own in this list, or from its own package; `__init__` only re-exports.
# CONTRIBUTING has the same list as a table.
LAYERS = [
    {"errors", "_native"},
    {"support"},
    {"env", "head_weights", "upstream"},
    {"checkpoints"},
    {"ops", "candle", "backbone"},
    {"formats"},
    {"heads"},
    {"modeling"},
    {"returns"},
    {"pretrained", "compat"},
    {"native", "rollouts"},
    {"packing"},
    {"sync"},
    {"scoring"},
    {"training"},
    {"fitting"},
    {"report"},
    {"serve"},
    {"ray"},
    {"demo", "benchmark"},
    {"cli"},
    {"__main__"},
]
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}
# `returns` works on numpy arrays without torch, as `candle` does, and `sync` on bytes; `ops` imports torch.
NATIVE_IMPORTERS = {"ops", "candle", "env", "returns", "sync"}
# Measures TRL's own head where somebody has installed a release that has one.
TRL_IMPORTER = PACKAGE / "benchmark" / "trl_head.py"
# A runner whose own words go to the terminal: its usage, and that it has no program to run.
PRINTING_RUNNER = PACKAGE / "compat" / "trl" / "__main__.py"

LONGEST_FUNCTION = 60


def module_of(path: Path) -> str:
    """The name below `vhead`: `cli` for `vhead/cli/score.py`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[str]:
    """Every dotted name that a source imports, `from a import b` as `a.b`, `import_module("a.b")` included."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from (f"{'.' * level}{module or ''}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name


def own_imports(source: str) -> set[str]:
    """The `vhead` modules that a source imports, by the name below `vhead`; a public name counts as its home."""
    names = {name.split(".")[1] for name in imports(source) if name.startswith("vhead.")}
    return {vhead._HOME.get(name, name) for name in names - {"__version__"}}


def upward_imports(module: str, source: str) -> list[str]:
    """Imports of `module` that do not point down the layers."""
    return [
        f"{module} imports {target}"
        for target in sorted(own_imports(source) - {module})
        if RANK.get(target, len(LAYERS)) >= RANK[module]
    ]


def module_imports(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which of these modules each imports, also late; imports for type checkers alone are left out."""
    graph = {}
    for name, source in sources.items():
        tree = ast.parse(source)
        for_checkers = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
        skipped = {id(inner) for block in for_checkers for inner in ast.walk(block)}
        found: set[str] = set()
        for node in ast.walk(tree):
            if id(node) not in skipped and isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif id(node) not in skipped and isinstance(node, ast.ImportFrom):
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= named & sources.keys() or {str(node.module)}
        graph[name] = (found & sources.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Ways from a module back to itself."""
    found: list[list[str]] = []
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph[module]):
                follow(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        follow(module, [])
    return found


def native_imports(module: str, source: str) -> list[str]:
    return [] if module in NATIVE_IMPORTERS else [f"{module} imports it" for t in own_imports(source) if t == "_native"]


def third_party(source: str) -> set[str]:
    return {name.split(".")[0] for name in imports(source)}


def relative_imports(source: str) -> list[str]:
    return [name for name in imports(source) if name.startswith(".")]


def prints(source: str) -> list[int]:
    """Lines that call `print`, or `write` of a standard stream."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if is_print(call.func)]


def is_print(function: ast.expr) -> bool:
    match function:
        case ast.Name(id="print"):
            return True
        case ast.Attribute(attr="write" | "writelines", value=stream):
            return re.search(r"\bsys\.(__)?std(out|err)\b", ast.unparse(stream)) is not None
    return False


def function_lengths(source: str) -> dict[str, int]:
    """Lines of each function from `def` to its end, docstring left out."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_overload(node):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            doc_lines = first.end_lineno - first.lineno + 1 if documented else 0
            lengths[f"{node.name}:{node.lineno}"] = node.end_lineno - node.lineno + 1 - doc_lines
    return lengths


def is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


def unnamed_rust_files(crate: Path) -> set[Path]:
    """Files below a crate's `src` that no `mod` declaration reaches from `lib.rs`."""
    reached, queue = set(), [crate / "src" / "lib.rs"]
    while queue:
        file = queue.pop()
        reached.add(file)
        folder = file.parent if file.name in {"lib.rs", "mod.rs"} else file.with_suffix("")
        names = re.findall(r"^\s*(?:pub(?:\([^)]*\))?\s+)?mod\s+(\w+);", file.read_text(), re.MULTILINE)
        candidates = [path for n in names for path in (folder / f"{n}.rs", folder / n / "mod.rs")]
        queue += [path for path in candidates if path.exists() and path not in reached]
    return set((crate / "src").rglob("*.rs")) - reached


def crates_below(package: str) -> set[str]:
    """Every crate that `package` is built on."""
    command = ["cargo", "tree", "--offline", "--locked", "--package", package, "--edges", "normal", "--prefix", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line.split()[0] for line in done.stdout.splitlines() if line}


def example_arguments(cls: type) -> dict[str, object]:
    """A value for each argument that an exception class requires."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    named = [p for p in parameters if p.name != "self" and p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    return {p.name: f"some {p.name}" for p in named}


@pytest.fixture(params=SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_module_has_a_layer() -> None:
    assert {module_of(path) for path in SOURCES} - {"__init__"} <= set(RANK)


def test_python_layers_point_one_way(source: Path) -> None:
    if source != PACKAGE / "__init__.py":
        assert upward_imports(module_of(source), source.read_text()) == []


def stated_layers(text: str) -> list[set[str]]:
    """The layers in the table of a page that goes through `python/vhead`."""
    _, _, table = text.partition("| in `python/vhead` | what it is |\n|---|---|\n")
    rows = table.partition("\n\n")[0].splitlines()
    return [{Path(name).stem for name in re.findall("`(.*?)`", row.split("|")[1])} for row in rows]


def test_contributing_states_the_layers() -> None:
    assert stated_layers((ROOT / "CONTRIBUTING.md").read_text()) == LAYERS


def test_layers_that_are_stated_in_another_order_are_seen() -> None:
    table = (
        "# A page\n\n| in `python/vhead` | what it is |\n|---|---|\n| `a.py`, `b/` | `c` |\n| `d/` | d |\n\n| `e` | |"
    )
    assert stated_layers(table) == [{"a", "b"}, {"d"}] != [{"d"}, {"a", "b"}]
    page = (ROOT / "CONTRIBUTING.md").read_text()
    heads = next(line for line in page.splitlines() if line.startswith("| `heads/`"))
    assert stated_layers(page.replace(f"{heads}\n", "")) != LAYERS


def test_layer_rule_can_fail() -> None:
    assert upward_imports("heads", "from vhead.modeling.wrapper import AutoModelForCausalLMWithValueHead")
    assert upward_imports("formats", "def load():\n    import vhead.scoring")
    assert upward_imports("ops", "from vhead import formats")
    assert upward_imports("heads", "from vhead import Scorer")
    assert upward_imports("cli", "from vhead import something_new")
    assert not upward_imports("cli", "from vhead import Scorer, __version__")
    assert not upward_imports("modeling", "from vhead.heads import ValueHead\nfrom vhead import ops")


def dotted(path: Path) -> str:
    parts = ["vhead", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_two_modules_import_each_other() -> None:
    assert circles(module_imports({dotted(path): path.read_text() for path in SOURCES})) == []


def test_circle_rule_can_fail() -> None:
    sources = {"a": "from b import c", "b": "import d", "b.c": "def f():\n    import a", "d": "import b"}
    assert module_imports(sources) == {"a": {"b.c"}, "b": {"d"}, "b.c": {"a"}, "d": {"b"}}
    assert circles(module_imports(sources)) == [["a", "b.c", "a"], ["b", "d", "b"]]
    hints = {"b.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a"}
    assert circles(module_imports(sources | hints)) == [["b", "d", "b"]]
    assert circles(module_imports(sources | hints | {"d": ""})) == []


def test_only_ops_candle_env_returns_and_sync_import_the_extension(source: Path) -> None:
    assert native_imports(module_of(source), source.read_text()) == []


def test_extension_rule_can_fail() -> None:
    assert native_imports("heads", "from vhead import _native")
    assert native_imports("heads", "from vhead._native import forward")
    assert native_imports("heads", "import importlib\nimportlib.import_module('vhead._native')")
    assert not native_imports("ops", "from vhead import _native")


def test_trl_is_imported_only_to_be_measured(source: Path) -> None:
    assert ("trl" in third_party(source.read_text())) == (source == TRL_IMPORTER)


def test_trl_rule_can_fail() -> None:
    assert "trl" in third_party("def peer():\n    from trl.experimental import ppo")
    assert "trl" not in third_party("import trlx")


def test_imports_are_absolute(source: Path) -> None:
    assert relative_imports(source.read_text()) == []


def test_absolute_import_rule_can_fail() -> None:
    assert relative_imports("from . import ops")
    assert relative_imports("from .ops import value_head")


def test_only_the_command_line_prints(source: Path) -> None:
    if module_of(source) != "cli" and source != PRINTING_RUNNER:
        assert prints(source.read_text()) == []


def test_print_rule_can_fail() -> None:
    assert prints("x = 1\nprint(x)") == [2]
    assert prints("import sys\nsys.stdout.write('a')\nsys.stderr.buffer.write(b'a')") == [2, 3]
    assert prints(PRINTING_RUNNER.read_text())
    assert prints("import sys\nfile.write(sys.stdout.encoding)") == []


def test_functions_are_short() -> None:
    lengths = {f"{path.name}:{name}": n for path in SOURCES for name, n in function_lengths(path.read_text()).items()}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION} == {}


def test_length_rule_can_fail() -> None:
    body = "\n".join("    x = 1" for _ in range(70))
    assert function_lengths(f'def long():\n    """Doc."""\n{body}') == {"long:1": 71}


@pytest.mark.parametrize("crate", ["core", "cuda", "candle", "sync", "python"])
def test_every_rust_file_is_compiled(crate: str) -> None:
    assert unnamed_rust_files(ROOT / "rust" / crate) == set()


def test_rust_file_rule_can_fail(tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "named").mkdir(parents=True)
    (source / "lib.rs").write_text("//! mod orphan;\npub(crate) mod named;\n")
    (source / "named.rs").write_text("mod inner;\n")
    (source / "named" / "inner.rs").touch()
    (source / "orphan.rs").touch()
    assert unnamed_rust_files(tmp_path) == {source / "orphan.rs"}


def test_core_knows_neither_python_nor_candle() -> None:
    foreign = {"pyo3", "candle-core", "vhead-candle", "vhead-python"}
    assert crates_below("vhead-core") & foreign == set()
    assert crates_below("vhead-candle") & {"pyo3", "vhead-python"} == set()
    assert crates_below("vhead-cuda") & foreign == set()
    assert crates_below("vhead-sync") & foreign == set()


def test_crate_rule_can_fail() -> None:
    assert {"pyo3", "candle-core", "vhead-core"} <= crates_below("vhead-python")


def exceptions() -> Iterator[type[Exception]]:
    """Every exception class that a module of the package defines."""
    for name in ["vhead", *(m.name for m in pkgutil.walk_packages(vhead.__path__, "vhead.")), "vhead._native"]:
        # `vhead.native` is an old name, which warns.
        if not name.endswith(("__main__", "vhead.native")):
            for thing in vars(importlib.import_module(name)).values():
                if inspect.isclass(thing) and issubclass(thing, Exception) and thing.__module__ == name:
                    yield thing


class LostError(VheadError):
    """Cannot be rebuilt from its `args`, as pickle would."""

    def __init__(self, record: str, *, field: str) -> None:
        super().__init__(f"{record}: {field}")


def pickling_offence(cls: type[Exception]) -> str | None:
    """What an exception of class `cls` loses on its way between two processes."""
    error = cls(**example_arguments(cls)) if example_arguments(cls) else cls("some message")
    try:
        copy = pickle.loads(pickle.dumps(error))
    except TypeError as problem:
        return f"{cls.__name__}: {problem}"
    same = type(copy) is cls and str(copy) == str(error) and vars(copy) == vars(error)
    return None if same else f"{cls.__name__}: {error!r} came back as {copy!r}"


def test_exceptions_survive_pickling() -> None:
    assert [offence for cls in exceptions() if (offence := pickling_offence(cls))] == []


def test_pickling_rule_can_fail() -> None:
    assert pickling_offence(LostError)


def test_every_exception_has_the_one_base() -> None:
    assert [cls.__name__ for cls in exceptions() if not issubclass(cls, VheadError)] == []
    assert VheadError in exceptions()


def test_version_is_written_once() -> None:
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert version("vhead") == workspace
    manifests = [tomllib.loads(path.read_text())["package"] for path in (ROOT / "rust").glob("*/Cargo.toml")]
    assert [package["version"] for package in manifests] == [{"workspace": True}] * 5
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert [path.name for path in SOURCES if workspace in path.read_text()] == []


def test_dev_holds_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (own,) = [Requirement(line) for line in extras["dev"] if line.startswith("vhead")]
    assert own.extras == extras.keys() - {"dev"}


REQUIRED = ["py.typed", "_native.pyi", "demo/model/model.safetensors", "demo/LICENSE-PSF.txt"]


@pytest.mark.parametrize("name", REQUIRED)
def test_the_wheel_s_files_exist_and_are_tracked(name: str) -> None:
    assert (PACKAGE / name).is_file()
    ignored = subprocess.run(["git", "check-ignore", "--no-index", "-q", PACKAGE / name], cwd=ROOT, check=False)
    assert ignored.returncode == 1, "maturin leaves out what git ignores"


def rust_imports(source: str) -> Iterator[tuple[bool, list[str]]]:
    """The paths of each `use`, by their new names, and whether it is a re-export; unit tests are left out."""
    code = re.sub(r"//.*", "", source.partition("#[cfg(test)]\nmod tests {")[0])
    for public, tree in re.findall(r"^\s*(pub(?:\([^)]*\))?\s+)?use\s+([^;]+);", code, re.MULTILINE):
        renamed = re.sub(r"\w+\s+as\s+(\w+)", r"\1", tree)
        yield from ((bool(public), path.split("::")) for path in branches("".join(renamed.split())))


def branches(tree: str) -> Iterator[str]:
    """`a::{b, c::{d}}` as `a::b` and `a::c::d`."""
    head, brace, rest = tree.partition("{")
    if not brace:
        yield head
        return
    start, depth, inner = 0, 0, rest.removesuffix("}")
    for end, letter in enumerate(f"{inner},"):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            yield from (head + branch for branch in branches(inner[start:end]) if branch)
            start = end + 1


def rust_import_circles(crate: Path) -> set[str]:
    """The files of a crate that import each other, in one step or several. A re-export counts as its home."""
    source = crate / "src"
    files = {module_path(path.relative_to(source)): path.read_text() for path in source.rglob("*.rs")}

    def home(place: tuple[str, ...], path: list[str]) -> tuple[str, ...] | None:
        steps = {"crate": (), "self": place, "super": place[:-1]}
        found = steps.get(path[0], place if (*place, path[0]) in files else None)
        names = path[1:] if path[0] in steps else path
        while found is not None and names and (*found, names[0]) in files:
            found, names = (*found, names[0]), names[1:]
        exports = [p for public, p in rust_imports(files.get(found, "")) if public and names and p[-1] == names[0]]
        return home(found, exports[0]) if exports else found

    graph = {of: {home(of, path) for _, path in rust_imports(text)} - {of, None} for of, text in files.items()}
    while ends := [of for of in graph if not graph[of] or not any(of in others for others in graph.values())]:
        graph = {of: others - set(ends) for of, others in graph.items() if of not in ends}
    return {"::".join(of) for of in graph}


def module_path(file: Path) -> tuple[str, ...]:
    """`("simd", "keep")` for `simd/keep.rs`, and `()` for `lib.rs`."""
    parts = file.with_suffix("").parts
    return parts[:-1] if parts[-1] in {"lib", "mod"} else parts


@pytest.mark.parametrize("crate", ["core", "cuda", "candle", "sync", "python"])
def test_no_rust_files_import_each_other(crate: str) -> None:
    assert rust_import_circles(ROOT / "rust" / crate) == set()


def test_rust_circle_rule_can_fail(tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "simd").mkdir(parents=True)
    (source / "lib.rs").write_text("mod a;\nmod b;\nmod simd;\npub use b::{B, C as D};\n")
    (source / "a.rs").write_text("use crate::{\n    B,\n    simd::{Level, run},\n};\n")
    (source / "b.rs").write_text("// use crate::a::A;\nuse std::fmt;\n")
    (source / "simd" / "mod.rs").write_text("use crate::b::B;\n")
    assert rust_import_circles(tmp_path) == set()
    (source / "b.rs").write_text("use super::simd::Level;\n")
    assert rust_import_circles(tmp_path) == {"b", "simd"}
    (source / "b.rs").write_text("use crate::a::A;\n")
    (source / "simd" / "mod.rs").write_text("#[cfg(test)]\nmod tests {\n    use crate::b::B;\n}\n")
    assert rust_import_circles(tmp_path) == {"a", "b"}
