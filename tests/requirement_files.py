"""Reads files of pinned releases: those of requirements/, and the worlds of tools/versions."""

from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Pin(NamedTuple):
    """A line of such a file: a package at one release, and the digests of its distributions."""

    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def release(self) -> str:
        """The release, or nothing where the line leaves a choice."""
        specifiers = list(self.requirement.specifier)
        return specifiers[0].version if [specifier.operator for specifier in specifiers] == ["=="] else ""

    def is_installed(self, environment: dict[str, str]) -> bool:
        """Whether the line holds for a Python on a system."""
        return self.requirement.marker is None or self.requirement.marker.evaluate(environment)


def read_pins(text: str) -> list[Pin]:
    """Every line but comments; one that is not a requirement raises `InvalidRequirement`."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    parts = [line.split("--hash=") for line in lines if line and not line.startswith("#")]
    return [Pin(Requirement(first.strip()), tuple(word.strip() for word in hashes)) for first, *hashes in parts]
