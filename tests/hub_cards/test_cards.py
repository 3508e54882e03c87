"""The card folders: up to date, self-contained, and true to what they say."""

import ast
import dataclasses
import inspect
import os
import re
import runpy
import sys
from pathlib import Path

import diffusers
import pytest
from huggingface_hub import ModelCard
from PIL import Image

import noiseopt.rewards
from noiseopt.cli import main
from noiseopt.hub import build, cards, stubs
from noiseopt.hub.before_after import PICTURE, BeforeAfter
from noiseopt.hub.bundle import Refused
from noiseopt.schedulers import list_noise_samplers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Packages that the declared dependencies require.
BROUGHT_ALONG = {"numpy", "PIL", "psutil", "huggingface_hub"}


def card_folders(root):
    """Those of the pipelines; `test_model_cards.py` reads the others."""
    return sorted(path.parent for path in (root / "hub_cards").glob("*/pipeline.py"))


@pytest.fixture(scope="module")
def readmes(root):
    return {folder.name: (folder / "README.md").read_text(encoding="utf-8") for folder in card_folders(root)}


@pytest.fixture(scope="module")
def bundle(root):
    return ast.parse((root / "hub_cards" / build.BUNDLE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dependencies(root):
    """The requirements that pyproject.toml declares."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def test_nothing_has_drifted():
    assert build.drifted() == build.drifted_stub_files() == [], "run `noiseopt hub build`"


def exit_of(arguments):
    """Return the exit status of a command, or its message."""
    try:
        main(arguments)
    except SystemExit as status:
        return status.code
    return 0


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder of three cards with pictures, and a copy of the package's stub files."""
    names = ("cno-flux", "reno-stable-diffusion", "reno-turbo")
    monkeypatch.setattr(build, "CARDS", [card for card in build.CARDS if card.name in names])
    monkeypatch.setattr(build, "HUB_CARDS", tmp_path / "hub_cards")
    monkeypatch.setattr(stubs, "stub_path", lambda cls: tmp_path / f"{cls.__name__}.pyi")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for card in build.CARDS:
        (tmp_path / "hub_cards" / card.name).mkdir(parents=True)
        facts = {"method": card.room, "model": card.shown_on, "steps": 3, "prompts": ["two stars"], "images": 1}
        facts |= {"seed": 0, "instruments": [], "right": [0, 1], "measure": "reward", "values": [1.0, 2.0]}
        path = tmp_path / "hub_cards" / card.name / PICTURE
        BeforeAfter(**facts, ruler=None, layout=None).save(Image.new("RGB", (8, 8)), path)
    return tmp_path / "hub_cards"


def test_check_names_what_drifted_and_what_helps(folders, capsys):
    assert exit_of(["hub", "build"]) == 0
    assert exit_of(["hub", "check"]) == 0
    (folders / "reno-turbo/pipeline.py").write_text("# edited by hand\n")
    text = (folders / "noiseopt_bundle.py").read_text(encoding="utf-8")
    (folders / "reno-turbo/noiseopt_bundle.py").unlink()
    (folders / "reno-turbo/noiseopt_bundle.py").write_text(text, encoding="utf-8")
    stub = folders.parent / "ReNOTurboPipeline.pyi"
    stub.write_text(stub.read_text().replace("eta: float", "eta: str"))
    (folders / "reno-stable-diffusion/README.md").unlink()
    (folders / "cno-flux/before_after.jpg").write_bytes((folders / "reno-turbo/before_after.jpg").read_bytes())
    (folders / "renamed").mkdir()
    for name in ("pipeline.py", "before_after.jpg"):
        (folders / "renamed" / name).write_bytes((folders / "cno-flux" / name).read_bytes())
    assert exit_of(["hub", "check"]) == 1
    named = re.findall(r"^(?:hub_cards/)?(\S+) is out of date: (.*)", capsys.readouterr().err, flags=re.MULTILINE)
    assert named == [
        ("cno-flux/README.md", "run `noiseopt hub build`"),
        ("cno-flux/before_after.jpg", "run `noiseopt hub pictures cno-flux`"),
        ("renamed/before_after.jpg", "it belongs to no card, delete it"),
        ("renamed/pipeline.py", "it belongs to no card, delete it"),
        ("reno-stable-diffusion/README.md", "run `noiseopt hub build`"),
        ("reno-turbo/noiseopt_bundle.py", "run `noiseopt hub build`"),
        ("reno-turbo/pipeline.py", "run `noiseopt hub build`"),
        ("ReNOTurboPipeline.pyi", "run `noiseopt hub build`"),
    ]
    assert exit_of(["hub", "build"]) == 0
    assert not build.drifted_stub_files() and (folders / "reno-turbo/noiseopt_bundle.py").is_symlink()


def test_refusal_is_an_exit_status(monkeypatch):
    def refuse(*_, **__):
        raise Refused("pipelines/x.py:7: a starred import")

    build.bundled.cache_clear()
    monkeypatch.setattr(build, "bundle", refuse)
    assert exit_of(["hub", "check"]) == exit_of(["hub", "build"]) == "pipelines/x.py:7: a starred import"


@pytest.mark.parametrize("action", [["build"], ["check"], ["pictures"], ["push", "reno-turbo", "--namespace", "me"]])
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


def test_class_files_are_those_of_the_package(root):
    """They differ in one import. diffusers expects one pipeline class in a file."""
    for card in build.CARDS:
        ours = ast.parse((root / "hub_cards" / card.name / "pipeline.py").read_text(encoding="utf-8"))
        theirs = ast.parse((root / f"{card.cls.__module__.replace('.', '/')}.py".partition("/")[2]).read_text("utf-8"))
        (mixin,) = (node for node in ours.body if isinstance(node, ast.ImportFrom) and node.level)
        (other,) = (node for node in theirs.body if isinstance(node, ast.ImportFrom) and node.level)
        assert (mixin.module, other.module) == ("noiseopt_bundle", "mixin")
        assert [alias.name for alias in mixin.names] == [card.cls.__bases__[0].__name__]
        mixin.module = other.module
        assert ast.dump(ours) == ast.dump(theirs)
        (cls,) = (node for node in ours.body if isinstance(node, ast.ClassDef))
        assert cls.name == card.cls.__name__ and [ast.unparse(base) for base in cls.bases][1:] == [card.stock.__name__]
        assert inspect.cleandoc(card.cls.__doc__ or "") == ast.get_docstring(cls)


def test_generated_lines_are_few(root):
    """One bundle for all cards, to which their folders link."""
    copies = sorted((root / "hub_cards").glob(f"*/{build.BUNDLE}"))
    assert [copy.parent.name for copy in copies] == sorted(card.name for card in (*build.CARDS, *build.BLOCKS))
    assert {os.readlink(copy) for copy in copies} == {f"../{build.BUNDLE}"}
    folders = [root / folder for folder in ("pipelines", "rewards", "callbacks", "schedulers")]
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    assert lines_of(root / "hub_cards" / build.BUNDLE) <= sum(map(lines_of, sources))
    assert max(map(lines_of, (root / "hub_cards").glob("*/README.md"))) <= 200
    assert max(map(lines_of, (root / "pipelines").rglob("*.pyi"))) <= 120


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_bundle_imports_declared_packages_only(bundle, dependencies):
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in dependencies}
    assert set(imported_packages(bundle)) <= declared | BROUGHT_ALONG | set(sys.stdlib_module_names)


def test_bundle_has_all_that_the_package_finds_by_name(bundle):
    """Methods, rewards, set rewards, features and noise samplers."""
    found: dict[str, set[str]] = {}
    for node in bundle.body:
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).startswith("register_"):
                found.setdefault(ast.unparse(decorator.func), set()).add(ast.literal_eval(decorator.args[0]))
    assert found["register_reward"] == set(noiseopt.list_rewards())
    assert found["register_set_reward"] == set(noiseopt.rewards.list_set_rewards())
    assert found["register_features"] == set(noiseopt.rewards.list_features())
    assert found["register_noise_sampler"] == set(list_noise_samplers())
    assert found["register_method"] == set(noiseopt.list_methods())


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
    """Return the text under a heading of a card, or an empty string."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text):
    """Return the cells of the table rows that begin with one name, which loses its quotes."""
    return re.findall(r"^\| `([\w.]+)` \| (.*) \| (.*) \|$", text, flags=re.MULTILINE)


def example_source(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]


def example_call(text):
    """Return the keyword arguments of the call of `pipe` in a card's first program, as syntax trees."""
    nodes = ast.walk(ast.parse(example_source(text)))
    (call,) = (node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe")
    return {keyword.arg: keyword.value for keyword in call.keywords}


def test_snippet_uses_arguments_that_exist(readmes):
    for card in build.CARDS:
        stock = inspect.signature(getattr(diffusers, card.stock.__name__).__call__).parameters
        ours = {name for name, *_ in rows(section(readmes[card.name], "Arguments"))}
        assert not ours & set(stock)
        assert set(example_call(readmes[card.name])) <= ours | set(stock)


def test_only_what_takes_rewards_promises_them(readmes):
    for card in build.CARDS:
        text = readmes[card.name]
        listed = sorted(
            re.findall(r"`([\w.]+)`(?=[^|\n]*\|[^|\n]*\|[^|\n]*\|$)", section(text, "Rewards"), re.MULTILINE)
        )
        if "rewards" in {name for name, *_ in rows(section(text, "Arguments"))}:
            call = example_call(text)
            named = [ast.literal_eval(call[name]) for name in ("rewards", "guard") if name in call]
            assert listed == noiseopt.list_rewards()
            assert named and all(({asked} if isinstance(asked, str) else set(asked)) <= set(listed) for asked in named)
        else:
            assert not listed and "`rewards`" not in text and "rewards=" not in example_source(text)


def test_settings_are_the_fields_with_a_default(readmes):
    for card in build.CARDS:
        fields = dataclasses.fields(card.method)
        expected = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        table = section(readmes[card.name], "Arguments").partition("and their defaults:")[2]
        assert {name: ast.literal_eval(default.strip("`")) for name, default, _ in rows(table)} == expected


def test_a_card_says_what_its_bundle_is(readmes):
    for card in build.CARDS:
        said = f"`noiseopt_bundle.py` the code of noiseopt {build.version()} behind it, generated as one file by"
        assert said in readmes[card.name] and f"from {card.cls.__module__} import" in readmes[card.name]


def test_every_argument_is_explained(readmes):
    """An empty cell is an argument that its docstring leaves out."""
    for text in readmes.values():
        meanings = [meaning for *_, meaning in rows(section(text, "Arguments"))]
        assert len(meanings) > 5
        assert all(meanings)


def test_readme_names_the_required_packages(readmes, dependencies):
    assert set(cards.REQUIREMENTS) <= set(dependencies)
    for text in readmes.values():
        assert all(f'"{requirement}"' in text for requirement in cards.REQUIREMENTS)
