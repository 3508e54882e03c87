"""The versions: what `pyproject.toml` allows, and the two ends of it that CI installs."""

import ast
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("plots", "lpips", "dreamsim", "timm")
BROUGHT_ALONG = {"numpy", "pil", "psutil", "huggingface-hub"}  # required by diffusers, accelerate and transformers
UNTESTED = {"torch"}  # one release of it alone has a CPU build where the tests run


def allowed() -> dict[str, Requirement]:
    """Return the requirements of the package, by normalized name."""
    found = map(Requirement, PROJECT["dependencies"])
    return {canonicalize_name(each.name): each for each in found}


def pins(name: str) -> dict[str, Version]:
    """The versions that a file of constraints pins."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [line.split("==") for line in lines if line]
    return {canonicalize_name(package): Version(version) for package, version in found}


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
    return Version(bound)


def imported_packages() -> set[str]:
    """Return the packages that modules of noiseopt import, but those of the standard library."""
    folders = ("src/noiseopt", "pipelines", "rewards", "callbacks", "schedulers")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return set(map(canonicalize_name, {name.partition(".")[0] for name in names} - sys.stdlib_module_names))


def test_what_is_imported_is_declared():
    extras = [Requirement(line) for name in EXTRAS for line in PROJECT["optional-dependencies"][name]]
    declared = allowed().keys() | {canonicalize_name(each.name) for each in extras}
    assert imported_packages() <= declared | BROUGHT_ALONG


def test_the_oldest_versions_that_are_allowed_are_those_that_are_tested():
    oldest, needed = pins("constraints-oldest.txt"), allowed()
    assert needed.keys() <= oldest.keys()
    for name in needed.keys() - UNTESTED:
        assert lower_bound(needed[name]) == oldest[name], name


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_pinned_versions_are_allowed(name):
    pinned = pins(name)
    assert allowed().keys() <= pinned.keys()
    assert all(pinned[package] in each.specifier for package, each in allowed().items())


def test_the_newest_are_newer_than_the_oldest():
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    assert all(newest[name] >= version for name, version in oldest.items())
    assert newest["torch"] == oldest["torch"]
    assert any(newest[name] > oldest[name] for name in ("diffusers", "transformers"))
