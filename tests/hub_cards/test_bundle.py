"""The bundler joins modules without changing what they mean, and refuses with file and line where it cannot."""

import re
import subprocess
import sys
import textwrap

import pytest

from noiseopt.hub.bundle import Refused, bundle, check_names, check_text, in_order, public_modules

GOOD = {
    "pipelines/noisy.py": '''
        """Draw the noise of a pipeline again and again.

        Paper: https://example.org
        """

        from __future__ import annotations

        # Shared by every pipeline of the package.
        from ..rewards.redness import Redness
        from ..rewards.sums import RewardSum
        import math

        __all__ = ["Noisy"]


        # Comments between definitions stay.
        class Noisy:
            """Example:

            >>> from .somewhere import Noisy
            """

            def total(self) -> float:
                return RewardSum([Redness(), Redness()])() + math.pi  # also at the end of a line
    ''',
    "rewards/sums.py": '''
        """A sum of rewards."""

        import math
        from collections.abc import Callable, Iterable

        from .redness import Redness

        Reward = Callable[[], float]


        class RewardSum:
            def __init__(self, rewards: Iterable[Redness]) -> None:
                self.rewards = rewards

            def __call__(self) -> float:
                return math.fsum(reward.value for reward in self.rewards)
    ''',
    "rewards/redness.py": '''
        """Not `Reward`: nothing is inherited."""

        from dataclasses import dataclass

        TABLE = """
        # not a comment


        end
        """


        @dataclass
        class Redness:
            value: float = 0.5
    ''',
}

BUNDLED = '''
"""Doc."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# The name that diffusers gives this module may come to mean the bundle of another release.
sys.modules[f"{__name__}_DIGEST"] = sys.modules[__name__]
__name__ = f"{__name__}_DIGEST"

# rewards/redness.py

TABLE = """
# not a comment


end
"""

@dataclass
class Redness:
    value: float = 0.5

# rewards/sums.py

Reward = Callable[[], float]

class RewardSum:
    def __init__(self, rewards: Iterable[Redness]) -> None:
        self.rewards = rewards

    def __call__(self) -> float:
        return math.fsum(reward.value for reward in self.rewards)

# pipelines/noisy.py

# Comments between definitions stay.
class Noisy:
    """Example:

    >>> from .somewhere import Noisy
    """

    def total(self) -> float:
        return RewardSum([Redness(), Redness()])() + math.pi  # also at the end of a line
'''


@pytest.fixture
def bundled(tmp_path):
    """bundled(files): the bundle of `pipelines/noisy.py` in a tree of those files, without its digest."""

    def build(files):
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(textwrap.dedent(source).lstrip("\n"))
        source = bundle([tmp_path / "pipelines/noisy.py"], tmp_path, "Doc.")
        return re.sub(r"_[0-9a-f]{12}\b", "_DIGEST", source)

    return build


def test_bundle(bundled):
    assert bundled(GOOD) == BUNDLED.lstrip("\n")


def test_bundle_is_self_contained(bundled):
    program = bundled(GOOD) + "\nprint(Noisy().total() - math.pi)\n"
    run = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "1.0\n"


def test_docstrings_of_functions_stay_in_the_sources(bundled):
    source = '''
        """Doc."""


        class OursMixin:
            """Shown by help."""

            def grow(self):
                """Shown too."""
                return 1


        class Ours:
            """Of a class."""

            def __call__(self):
                """Shown as well."""
                return 2

            def only(self):
                """All that there is."""


        def total():
            """Hidden.

            With more to say.
            """
            return 3
    '''
    text = bundled({"pipelines/noisy.py": source})
    assert all(shown in text for shown in ("Shown by help", "Shown too", "Of a class", "Shown as well", "All that"))
    assert "def total():\n    return 3" in text and "Hidden" not in text


def test_imports_are_sorted_and_wrapped(bundled):
    names = ["a_rather_long_function_name", "another_rather_long_function_name", "BIG", "ALongClassName"]
    source = f'''
        """Doc."""

        import torch.nn.functional as F
        from PIL import Image
        import json
        from zoo import {", ".join(names)}, something_as_long_as_that
        import torch
        from json import dumps as to_json, loads
    '''
    expected = """
        import json
        import sys
        from json import dumps as to_json
        from json import loads

        import torch
        import torch.nn.functional as F
        from PIL import Image
        from zoo import (
            BIG,
            ALongClassName,
            a_rather_long_function_name,
            another_rather_long_function_name,
            something_as_long_as_that,
        )
    """
    imports = bundled({"pipelines/noisy.py": source}).split('"""\n\n')[1].partition("\n# The name")[0]
    assert imports == textwrap.dedent(expected).lstrip("\n")


def entry(code):
    return {"pipelines/noisy.py": f'"""Doc."""\n{code}\n'}


REFUSED = {
    "renamed": (entry("from .a import A as B"), "noisy.py:2: a renamed relative import"),
    "starred": (entry("from .a import *"), "noisy.py:2: a starred import"),
    "starred, third party": (entry("from math import *"), "noisy.py:2: a starred import"),
    "module of a package": (entry("from . import a"), "noisy.py:2: import names from the module that defines them"),
    "package": (
        entry("from ..rewards import A") | {"rewards/__init__.py": "from .a import A"},
        "noisy.py:2: no file rewards.py: import from the defining module",
    ),
    "room": (
        entry("from .room import A") | {"pipelines/room/__init__.py": "from .a import A"},
        "noisy.py:2: no file room.py: import from the defining module",
    ),
    "missing": (entry("from ..rewards.nowhere import A"), "noisy.py:2: no file rewards/nowhere.py"),
    "in a function": (entry("def f():\n    from .a import A"), "noisy.py:3: a relative import has to stand"),
    "for type checkers": (
        entry("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import A"),
        "noisy.py:4: a relative import has to stand",
    ),
    "on one line": (entry("if True: from .a import A"), "noisy.py:2: a relative import has to stand"),
    "cycle": (
        entry("from .b import B") | {"pipelines/b.py": "from .noisy import C\nclass B: pass"},
        "b.py:1: circular import noisy -> b -> noisy",
    ),
    "same definition": (
        entry("from .b import B\n\ndef mean(): pass") | {"pipelines/b.py": "mean = 1\nclass B: pass"},
        "noisy.py:4: `mean` means something else in pipelines/b.py:1",
    ),
    "same definition under try": (
        entry("from .b import B\ntry:\n    x = 1\nexcept ValueError:\n    x = 2")
        | {"pipelines/b.py": "class B: pass\nfor x in 'ab': pass"},
        "noisy.py:4: `x` means something else in pipelines/b.py:2",
    ),
    "definition of an imported name": (
        entry("from .b import B\nfrom math import pi") | {"pipelines/b.py": "pi = 3\nclass B: pass"},
        "noisy.py:3: `pi` means something else in pipelines/b.py:1",
    ),
    "other import of the same name": (
        entry("from .b import B\nfrom math import log") | {"pipelines/b.py": "from numpy import log\nclass B: pass"},
        "noisy.py:3: `log` means something else in pipelines/b.py:1",
    ),
    "builtin hidden": (entry("def max(x): return x"), "noisy.py:2: `max` would hide the builtin"),
    "own package": (entry("from noiseopt.rewards.a import A"), "noisy.py:2: `noiseopt` is not installed"),
    "own package in a function": (entry("def f():\n    import noiseopt.rewards"), "noisy.py:3: `noiseopt` is not"),
    "import in a docstring": (
        entry('def f():\n    """\n    from .a import A\n    """'),
        "noisy.py:4: diffusers reads this text as a relative import",
    ),
    "data beside the file": (entry("HERE = __file__"), "noisy.py:2: a bundle has no files beside it"),
}


@pytest.mark.parametrize(("files", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(bundled, files, message):
    with pytest.raises(Refused) as refusal:
        bundled({"pipelines/a.py": "class A: pass\n"} | files)
    assert str(refusal.value).startswith(f"pipelines/{message}")


def test_same_third_party_name_in_two_modules(bundled):
    files = entry("from .b import B\nimport torch.nn.functional as F\nimport torch")
    source = bundled(files | {"pipelines/b.py": "import torch\nfrom torch.nn import functional as F\nclass B: pass"})
    assert source.count("import torch\n") == 1


def test_public_modules(bundled, tmp_path):
    """Everything that the `__init__.py` of a folder imports is in the bundle, because it may be asked for by name."""
    bundled(
        GOOD
        | {"rewards/__init__.py": "from .sums import RewardSum\nfrom .blueness import Blueness"}
        | {"rewards/blueness.py": "class Blueness: pass", "rewards/unused.py": "class Unused: pass"}
    )
    public = public_modules(tmp_path / "rewards/__init__.py", tmp_path)
    source = bundle([*public, tmp_path / "pipelines/noisy.py"], tmp_path, "Doc.")
    parts = ["rewards/redness.py", "rewards/sums.py", "rewards/blueness.py", "pipelines/noisy.py"]
    assert [line[2:] for line in source.splitlines() if line.startswith("# ") and line.endswith(".py")] == parts


def test_links_of_the_package_are_followed_as_they_are_named(bundled, tmp_path):
    """In a checkout the folders of a package are links; its imports mean the package."""
    bundled(
        {
            "folders/rewards/room/red.py": "from ...leaf import Leaf\nclass Red(Leaf): pass",
            "package/leaf.py": "class Leaf: pass",
        }
        | {"pipelines/noisy.py": "x = 1"}
    )
    (tmp_path / "package/rewards").symlink_to("../folders/rewards")
    source = bundle([tmp_path / "package/rewards/room/red.py"], tmp_path / "package", "Doc.")
    assert source.endswith("# leaf.py\n\nclass Leaf: pass\n\n# rewards/room/red.py\n\nclass Red(Leaf): pass\n")


def test_bundles_with_one_file_name_stay_apart(bundled, tmp_path):
    """diffusers replaces a bundle by the next one: the classes of both are found in modules of their own."""
    program = """
import sys, typing
from pathlib import Path
found = []
for path in sys.argv[1:]:
    Path("same_name.py").write_text(Path(path).read_text())
    sys.path.insert(0, ".")
    sys.dont_write_bytecode = True
    found.append(__import__("same_name").Redness)
    del sys.modules["same_name"]
old, new = found
assert sys.modules[old.__module__].Redness is old and sys.modules[new.__module__].Redness is new and old is not new
assert (typing.get_type_hints(old)["value"], typing.get_type_hints(new)["value"]) == (float, int)
"""
    later = GOOD | {"rewards/redness.py": GOOD["rewards/redness.py"].replace("float = 0.5", "int = 1")}
    for name, files in (("old.py", GOOD), ("new.py", later)):
        bundled(files)
        (tmp_path / name).write_text(bundle([tmp_path / "pipelines/noisy.py"], tmp_path, "Doc."))
    run = subprocess.run(
        [sys.executable, "-c", program, "old.py", "new.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_modules_of_the_package_can_meet_in_a_bundle(root):
    """The bundle has one namespace, and any method or mixin may come to import any other module."""
    package = root / "src/noiseopt"
    folders = [package / name for name in ("rewards", "schedulers", "callbacks", "pipelines")]
    paths = [path for folder in folders for path in sorted(folder.glob("**/*.py")) if path.name != "__init__.py"]
    modules = in_order(paths, package)
    assert len(modules) > 100
    check_names(modules)
    for module in modules:
        check_text(module)
