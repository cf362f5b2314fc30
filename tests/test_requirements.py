"""requirements/ is in step with pyproject.toml, on every Python and system that this repository's commands run on."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from tests.requirement_files import Pin, read_pins

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SYSTEMS = (("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64"))
ENVIRONMENTS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": system,
        "platform_system": name,
        "platform_machine": machine,
    }
    for python in PYTHONS
    for system, name, machine in SYSTEMS
]
# Each file, and the extras and groups of pyproject.toml that it is for.
FILES = {"build": ["build"], "demo": ["cli", "data"], "test": ["build", *EXTRAS]}
# Where something may be fetched from, or lay on somebody's machine.
ADDRESS = re.compile(r"://|file:|(^|\s)[~/]|^\s*-[a-z]|--(?!hash=)")


def text(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text()


def wanted(name: str) -> list[Requirement]:
    """What pyproject.toml asks for in a file's place; `vhead[...]` in an extra stands for other extras of `test`."""
    groups = EXTRAS | PROJECT["dependency-groups"]
    lines = [line for group in FILES[name] for line in groups[group]]
    lines += PROJECT["project"]["dependencies"] if name != "build" else []
    return [Requirement(line) for line in lines if not line.startswith("vhead[")]


def offences(locked: str, requirements: list[Requirement]) -> list[str]:
    """What keeps a file from being the whole and only source of what is installed."""
    found = [f"an address: {line}" for line in locked.splitlines() if ADDRESS.search(line)]
    lines = read_pins(locked)
    found += [f"no release: {pin.requirement}" for pin in lines if not pin.release]
    found += [f"no digests: {pin.requirement}" for pin in lines if not digests_are_whole(pin)]
    for environment in ENVIRONMENTS:
        found += mismatches([pin for pin in lines if pin.is_installed(environment)], requirements, environment)
    return list(dict.fromkeys(found))


def digests_are_whole(pin: Pin) -> bool:
    return bool(pin.hashes) and all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in pin.hashes)


def mismatches(installed: list[Pin], requirements: list[Requirement], environment: dict[str, str]) -> list[str]:
    releases = {pin.name: pin.release for pin in installed}
    found = [] if len(releases) == len(installed) else ["two releases of one package"]
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        release = releases.get(canonicalize_name(requirement.name))
        if not release or not requirement.specifier.contains(release, prereleases=True):
            found.append(f"{requirement}: {release}")
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_lock_holds_what_pyproject_asks_for(name):
    assert offences(text(name), wanted(name)) == [], "make lock"


def test_there_are_no_other_locks():
    assert {path.name for path in (ROOT / "requirements").iterdir()} == {f"{name}.txt" for name in FILES}


@pytest.mark.parametrize("name", ["build", "demo"])
def test_the_whole_has_the_pins_of_its_parts(name):
    whole = {(pin.name, pin.release): set(pin.hashes) for pin in read_pins(text("test"))}
    for pin in read_pins(text(name)):
        assert set(pin.hashes) == whole[pin.name, pin.release]


DIGEST = f"--hash=sha256:{'0' * 64}"
BROKEN = {
    "a requirement without a pin": (f"rich==15.0 {DIGEST}", "numpy>=1.26: None"),
    "a pin below what is asked for": (f"numpy==1.25.0 {DIGEST}", "numpy>=1.26: 1.25.0"),
    "a pin that Linux alone has": (f"numpy==2.0 ; sys_platform == 'linux' {DIGEST}", "numpy>=1.26: None"),
    "a pin that new Pythons lack": (f"numpy==2.0 ; python_version < '3.14' {DIGEST}", "numpy>=1.26: None"),
    "two pins of one package": (f"numpy==2.0 {DIGEST}\nNumPy==2.1 {DIGEST}", "two releases of one package"),
    "a range": (f"numpy>=2.0 {DIGEST}", "no release: numpy>=2.0"),
    "no digest": ("numpy==2.0", "no digests: numpy==2.0"),
    "a short digest": ("numpy==2.0 --hash=sha256:00", "no digests: numpy==2.0"),
    "an address in a comment": (f"# https://example.org\nnumpy==2.0 {DIGEST}", "an address: # https://example.org"),
    "a path in a comment": (f"# from /home/me/lock\nnumpy==2.0 {DIGEST}", "an address: # from /home/me/lock"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_the_check_of_locks_can_fail(kind):
    locked, message = BROKEN[kind]
    assert message in offences(locked, [Requirement("numpy>=1.26")])
    assert offences(f"numpy==2.0 {DIGEST}", [Requirement("numpy>=1.26")]) == []


@pytest.mark.parametrize("option", ["--index-url https://example.org/simple", "--find-links /opt/wheels", "-e ."])
def test_an_option_is_no_pin(option):
    with pytest.raises(InvalidRequirement):
        offences(f"{option}\nnumpy==2.0 {DIGEST}", [])


@pytest.mark.parametrize("workflow", ["ci", "newest"])
def test_workflows_run_the_oldest_and_the_newest_python(workflow):
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text())["jobs"]
    matrices = [job["strategy"]["matrix"]["python"] for job in jobs.values() if "strategy" in job]
    assert matrices == [[PYTHONS[0], PYTHONS[-1]]]
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
