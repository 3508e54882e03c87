"""The layout: who may import whom, what a build takes along, and what keeps the tools seeing one package."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from noiseopt.shapes_world import MODELS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = ("callbacks", "pipelines", "rewards", "schedulers")
LEAVES = ("registry", "checked_fields", "private_names", "shown_text", "frames")  # every folder may import them
PAPERS = ("reno", "cno", "noise_diffusion", "never_too_late", "reward_guidance", "seed_variance")
MODULES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def imports_of(path: Path) -> Iterator[str]:
    """The modules that a module imports, as `pipelines.reno.method`; `noiseopt` for an absolute import of ours."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            names = [".".join([*base, *([node.module] if node.module else [])])]
            if not node.level:
                names = [node.module or ""]
            elif not base and not node.module:
                names = [alias.name for alias in node.names]
            yield from names if node.level else [name for name in names if name.split(".")[0] == "noiseopt"]
        yield from (name for name in names if isinstance(node, ast.Import) and name.split(".")[0] == "noiseopt")


def may_import(path: Path, module: str) -> bool:
    """Return whether a module may import another: folders know leaves and themselves, `pipelines` all folders."""
    target, own = module.split("."), path.relative_to(ROOT).parts
    if module in LEAVES:
        return True
    if target[0] not in FOLDERS or own[0] not in ("pipelines", target[0]):
        return False
    between_papers = own[:2] != tuple(target[:2]) and own[1] in PAPERS and target[1:2] and target[1] in PAPERS
    return own[0] != "pipelines" or not between_papers


def test_who_may_import_whom():
    """`rewards`, `schedulers` and `callbacks` import no other folder, and no paper imports another."""
    assert [(path.name, name) for path in MODULES for name in imports_of(path) if not may_import(path, name)] == []


def test_the_rules_find_what_they_forbid():
    assert not may_import(ROOT / "rewards/sets/dpp.py", "pipelines.hook")
    assert not may_import(ROOT / "pipelines/cno/method.py", "pipelines.reno.method")
    assert not may_import(ROOT / "callbacks/cads.py", "noiseopt")
    assert not may_import(ROOT / "schedulers/noise_samplers.py", "rewards.contract.reward")
    assert may_import(ROOT / "pipelines/cno/method.py", "rewards.contract.reward")
    found = set(imports_of(ROOT / "pipelines/reno/method.py"))
    assert {"pipelines.method", "callbacks.noise_state", "checked_fields", "pipelines.reno.objective"} <= found


def test_top_files_of_pipelines_know_no_paper():
    top = sorted((ROOT / "pipelines").glob("*.py"))
    rooms = {(path.name, name) for path in top if path.name != "__init__.py" for name in imports_of(path)}
    assert [pair for pair in rooms if pair[1].split(".")[:2] in [["pipelines", paper] for paper in PAPERS]] == []


def package_folders() -> dict[str, str]:
    """The packages of the tree and their real folders."""
    roots = [(f"noiseopt.{folder}", ROOT / folder) for folder in FOLDERS] + [("noiseopt", ROOT / "src/noiseopt")]
    found = {}
    for name, root in roots:
        for folder, _, files in os.walk(root):
            if "__init__.py" in files:
                path = Path(folder)
                found[".".join([name, *path.relative_to(root).parts])] = path.relative_to(ROOT).as_posix()
    return found


def test_packages_are_those_of_the_tree():
    tops = {"noiseopt": "src/noiseopt"} | {f"noiseopt.{folder}": folder for folder in FOLDERS}
    assert SETUPTOOLS["package-dir"] == tops
    assert sorted(SETUPTOOLS["packages"]) == sorted(package_folders())


def test_pytest_and_python_see_no_package_at_the_root():
    for name in ("__init__.py", "conftest.py", "tests/__init__.py"):
        assert not (ROOT / name).exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_for_the_tools_are_relative(folder):
    assert os.readlink(ROOT / "src/noiseopt" / folder) == f"../../{folder}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the checkout: a build leaves folders behind."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    for name in ("src", *FOLDERS):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignore)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=checkout, check=True, capture_output=True, timeout=60)
    return next(out.glob("*.whl"))


def test_package_data_is_the_weights_of_the_wheel():
    """Each model that is in the wheel by its pattern, and no other."""
    package = ROOT / "src/noiseopt/shapes_world"
    patterns = SETUPTOOLS["package-data"]["noiseopt.shapes_world"]
    assert patterns == [f"weights/{model.name}/**/*" for model in MODELS.values() if model.in_wheel]
    found = {path.relative_to(package).parts[1] for pattern in patterns for path in package.glob(pattern)}
    assert found == {model.name for model in MODELS.values() if model.in_wheel}


def carried_weights() -> list[Path]:
    """The files of the models that are in the wheel, without the course of their training."""
    folder = ROOT / "src/noiseopt/shapes_world/weights"
    carried = [folder / model.name for model in MODELS.values() if model.in_wheel]
    files = [path for model in carried for path in model.rglob("*") if path.is_file()]
    return [path for path in files if path.suffix != ".png" and path.name != "training.json"]


def test_wheel_holds_every_module_and_its_weights(wheel):
    folders = {name.replace(".", "/"): ROOT / folder for name, folder in package_folders().items()}
    expected = {f"{name}/{path.name}" for name, folder in folders.items() for path in folder.glob("*.py*")}
    expected |= {f"noiseopt/hub/templates/{path.name}" for path in (ROOT / "src/noiseopt/hub/templates").iterdir()}
    expected |= {path.relative_to(ROOT / "src").as_posix() for path in carried_weights()} | {"noiseopt/py.typed"}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


def test_weights_are_small(wheel):
    """15 MB in the wheel, 40 MB in the repository."""
    everything = (path for path in (ROOT / "src/noiseopt/shapes_world/weights").rglob("*") if path.is_file())
    assert wheel.stat().st_size <= 15e6
    assert sum(path.stat().st_size for path in everything) <= 40e6


def test_wheel_imports(wheel, processes, tmp_path):
    """Every module imports from the unpacked wheel, and none from the checkout; a pipeline is saved from there too."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = """
import importlib, pathlib, sys
target = pathlib.Path(sys.argv[1]).resolve()
for path in sorted(target.rglob("*.py")):
    if path.name != "__main__.py":
        parts = path.relative_to(target).with_suffix("").parts
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        assert pathlib.Path(module.__file__).resolve() == path, module
cls = sys.modules["noiseopt.pipelines.reno.turbo"].ReNOTurboPipeline
code = sys.modules["noiseopt.pipelines.results.pipeline_code"].code_of(cls)
assert "class ReNOTurboPipeline(" in code["pipeline.py"] and "class ReNOMixin(" in code["noiseopt_bundle.py"]
"""
    run = processes.run(program, tmp_path, folder=tmp_path, path=[tmp_path])
    assert run.returncode == 0, run.stderr


def test_src_has_no_import_circle():
    """Imports inside functions count; those for type checkers do not."""
    package = ROOT / "src/noiseopt"
    names = {path: ".".join(path.relative_to(package.parent).with_suffix("").parts) for path in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}

    def imported(name: str) -> Iterator[str]:
        tree = ast.parse(modules[name].read_text())
        guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        skipped = {n for guard in guards for statement in guard.body for n in ast.walk(statement)}
        parents = names[modules[name]].split(".")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and node not in skipped:
                base = ".".join(parents[: -node.level] + [node.module] * bool(node.module))
                submodules = {f"{base}.{alias.name}" for alias in node.names} & modules.keys()
                yield from submodules or {base} & modules.keys()

    # raises CycleError, which names the circle; the package itself is imported before each of its modules
    graphlib.TopologicalSorter({name: set(imported(name)) - {name, "noiseopt"} for name in modules}).prepare()
