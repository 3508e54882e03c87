"""What lies in the card folders: up to date, self-contained, and true to what it says."""

import ast
import dataclasses
import importlib
import inspect
import re
import runpy
import shutil
import sys

import diffusers
import pytest
from huggingface_hub import ModelCard

from noiseopt.cli import main
from noiseopt.hub import build, cards
from noiseopt.hub.before_after import PICTURE
from noiseopt.hub.bundle import Refused

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Packages that the declared dependencies bring: each is required by diffusers, transformers, accelerate or
# huggingface_hub.
BROUGHT_ALONG = {"numpy", "PIL", "psutil", "tqdm", "huggingface_hub"}


def card_folders(root):
    """Those of the pipelines; `test_model_cards.py` reads the others."""
    return sorted(path.parent for path in (root / "hub_cards").glob("*/pipeline.py"))


@pytest.fixture(scope="module")
def readmes(root):
    return {folder.name: (folder / "README.md").read_text(encoding="utf-8") for folder in card_folders(root)}


@pytest.fixture(scope="module")
def bundles(root):
    return {
        folder.name: ast.parse((folder / "pipeline.py").read_text(encoding="utf-8")) for folder in card_folders(root)
    }


@pytest.fixture(scope="module")
def dependencies(root):
    """The requirements that pyproject.toml declares."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def test_nothing_has_drifted():
    assert build.drifted() == [], "run `noiseopt hub check`"


def exit_of(arguments):
    """The exit status of a command, or its last words."""
    try:
        main(arguments)
    except SystemExit as status:
        return status.code
    return 0


@pytest.fixture
def folders(root, tmp_path, monkeypatch):
    """A folder for three of the cards that holds their pictures only."""
    names = ("cno-flux", "reno-stable-diffusion", "reno-turbo")
    monkeypatch.setattr(build, "CARDS", [card for card in build.CARDS if card.name in names])
    monkeypatch.setattr(build, "HUB_CARDS", tmp_path / "hub_cards")
    for name in names:
        (tmp_path / "hub_cards" / name).mkdir(parents=True)
        shutil.copy(root / "hub_cards" / name / PICTURE, tmp_path / "hub_cards" / name)
    return tmp_path / "hub_cards"


def test_check_names_what_drifted_and_what_helps(folders, capsys):
    assert exit_of(["hub", "build"]) == 0
    assert exit_of(["hub", "check"]) == 0
    (folders / "reno-turbo/pipeline.py").write_text("# edited by hand\n")
    (folders / "reno-stable-diffusion/README.md").unlink()
    (folders / "cno-flux/before_after.png").write_bytes((folders / "reno-turbo/before_after.png").read_bytes())
    (folders / "renamed").mkdir()
    for name in ("pipeline.py", "before_after.png"):
        (folders / "renamed" / name).write_bytes((folders / "cno-flux" / name).read_bytes())
    assert exit_of(["hub", "check"]) == 1
    named = re.findall(r"^hub_cards/(\S+) is out of date: (.*)", capsys.readouterr().err, flags=re.MULTILINE)
    assert named == [
        ("cno-flux/README.md", "run `noiseopt hub build`"),
        ("cno-flux/before_after.png", "run `noiseopt hub pictures cno-flux`"),
        ("renamed/before_after.png", "it belongs to no card, delete it"),
        ("renamed/pipeline.py", "it belongs to no card, delete it"),
        ("reno-stable-diffusion/README.md", "run `noiseopt hub build`"),
        ("reno-turbo/pipeline.py", "run `noiseopt hub build`"),
    ]


def test_refusal_is_an_exit_status(monkeypatch):
    def refuse(*_, **__):
        raise Refused("pipelines/x.py:7: a starred import")

    monkeypatch.setattr(build, "bundle", refuse)
    assert exit_of(["hub", "check"]) == exit_of(["hub", "build"]) == "pipelines/x.py:7: a starred import"


@pytest.mark.parametrize("action", (["build"], ["check"], ["pictures"], ["push", "reno-turbo", "--namespace", "me"]))
def test_without_a_checkout_that_is_said(action, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HUB_CARDS", tmp_path / "hub_cards")
    assert "Expected a checkout of the repository" in str(exit_of(["hub", *action]))


def test_the_script_of_the_folder_is_the_command(root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["build.py", "push", "nobody", "--namespace", "me"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(root / "hub_cards/build.py"), run_name="__main__")
    assert "Expected a card out of reno-turbo, " in capsys.readouterr().err


def test_every_card_has_a_folder(root):
    assert [folder.name for folder in card_folders(root)] == sorted(card.name for card in build.CARDS)
    readmes = sorted(path.parent.name for path in (root / "hub_cards").glob("*/README.md"))
    assert readmes == sorted(card.name for card in build.all_cards())


def test_bundle_defines_one_pipeline(bundles):
    for tree in bundles.values():
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        assert sum(ast.unparse(base).endswith("Pipeline") for node in classes for base in node.bases) == 1


def test_bundle_imports_declared_packages_only(bundles, dependencies):
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in dependencies}
    for tree in bundles.values():
        assert set(imported_packages(tree)) <= declared | BROUGHT_ALONG | set(sys.stdlib_module_names)


def imported_packages(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module
            yield node.module.split(".")[0]


def test_front_matter(readmes):
    for card in build.CARDS:
        data = ModelCard(readmes[card.name]).data.to_dict()
        assert {"diffusers", "custom-pipeline"} <= set(data.pop("tags"))
        assert data == {
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "license": "apache-2.0",
            "base_model": card.base_model,
        }


def test_snippets_compile_and_fit_the_card(readmes):
    for card in build.CARDS:
        first, second = re.findall(r"```python\n(.*?)```", readmes[card.name], flags=re.DOTALL)
        compile(second, card.name, "exec")
        keywords = {
            keyword.arg: keyword.value.value
            for keyword in ast.walk(ast.parse(first))
            if isinstance(keyword, ast.keyword) and isinstance(keyword.value, ast.Constant)
        }
        compile(first, card.name, "exec")
        assert keywords["custom_pipeline"] == f"noiseopt/{card.name}"
        assert keywords["trust_remote_code"] is True
        assert card.base_model in first


def section(text, title):
    """What a card says under a heading; nothing without it."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text):
    """The cells of each row of the tables in a text that begins with a name, which is given without its quotes."""
    return re.findall(r"^\| `([\w.]+)` \| (.*) \| (.*) \|$", text, flags=re.MULTILINE)


def example_call(text):
    """The keyword arguments of the call of `pipe` in a card's first program, as syntax trees."""
    nodes = ast.walk(ast.parse(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]))
    (call,) = (node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe")
    return {keyword.arg: keyword.value for keyword in call.keywords}


def test_snippet_uses_arguments_that_exist(readmes):
    for card in build.CARDS:
        stock = inspect.signature(getattr(diffusers, card.stock).__call__).parameters
        ours = {name for name, *_ in rows(section(readmes[card.name], "Arguments"))}
        assert not ours & set(stock)
        assert set(example_call(readmes[card.name])) <= ours | set(stock)


def test_only_what_takes_rewards_promises_them(readmes, bundles):
    for card in build.CARDS:
        text = readmes[card.name]
        registered = {name for node in bundles[card.name].body for name in cards.registered_names(node)}
        assert {name for name, *_ in rows(section(text, "Rewards"))} == registered
        if "rewards" in {name for name, *_ in rows(section(text, "Arguments"))}:
            asked = ast.literal_eval(example_call(text)["rewards"])
            assert ({asked} if isinstance(asked, str) else set(asked)) <= registered
        else:
            assert not registered and "reward" not in text.lower()


def test_stock_class_is_the_base_of_the_pipeline(bundles):
    for card in build.CARDS:
        classes = [node for node in bundles[card.name].body if isinstance(node, ast.ClassDef)]
        assert card.stock in {ast.unparse(base) for node in classes for base in node.bases}


def test_settings_are_the_fields_with_a_default(readmes):
    for card in build.CARDS:
        fields = dataclasses.fields(getattr(importlib.import_module("noiseopt.pipelines"), card.method.name))
        expected = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        table = section(readmes[card.name], "Arguments").partition("Settings of the method")[2]
        assert {name: ast.literal_eval(default.strip("`")) for name, default, _ in rows(table)} == expected


def test_every_argument_is_explained(readmes):
    """The tables come from docstrings: an empty cell is an argument that its docstring leaves out."""
    for text in readmes.values():
        meanings = [meaning for *_, meaning in rows(section(text, "Arguments"))]
        assert len(meanings) > 5
        assert all(meanings)


def test_readme_names_the_required_packages(readmes, dependencies):
    assert set(cards.REQUIREMENTS) <= set(dependencies)
    for text in readmes.values():
        assert all(f'"{requirement}"' in text for requirement in cards.REQUIREMENTS)
