"""Installed versions against those that the package asks for.

They are read from what pip wrote, in milliseconds and without importing any of the packages.
Not covered: a package used from a folder, without installation, where nothing says what is wanted.
"""

from __future__ import annotations

import importlib.metadata
import platform

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nexus_ds.errors import ConfigError

COMPARED = ("torch", "deepspeed", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Return the versions that must agree on all nodes."""
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in COMPARED}


def version_problems() -> list[str]:
    """Return installed packages that are not what the package asks for."""
    problems = [_requirement_problem(requirement) for requirement in _wanted()]
    return [problem for problem in problems if problem]


def refuse_older() -> None:
    """Raise ConfigError where a package with which a training computes is older than it may be.

    Older ones have faults that newer ones do without, of security too, and what is read of
    DeepSpeed's insides is not there. A newer one is left to preflight: it may well serve.
    """
    floors = []
    for requirement in _wanted():
        if requirement.name in COMPARED:
            lowest = ",".join(str(one) for one in requirement.specifier if one.operator == ">=")
            requirement.specifier = SpecifierSet(lowest)
            floors.append(requirement)
    problems = [_requirement_problem(requirement) for requirement in floors]
    if any(problems):
        raise ConfigError("; ".join(problem for problem in problems if problem))


def _wanted() -> list[Requirement]:
    """Return the packages that all need; none where nothing says so."""
    try:
        texts = importlib.metadata.requires("nexus-ds") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [requirement for text in texts if _is_needed(requirement := Requirement(text))]


def _is_needed(requirement: Requirement) -> bool:
    """Return whether a package is one that all need: none of an extra, of another system."""
    marker = requirement.marker
    return marker is None or marker.evaluate({"extra": ""})


def _requirement_problem(requirement: Requirement) -> str:
    """Return what is wrong with an installed package, '' if nothing is."""
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed, expected {requirement}; type: make setup"
    if requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"{requirement.name} {found} found, {requirement.specifier} expected; type: make setup"
