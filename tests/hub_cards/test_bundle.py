"""The bundler joins modules without changing what they mean, and refuses with file and line where it cannot."""

import subprocess
import sys
import textwrap

import pytest

from noiseopt.hub.bundle import Refused, bundle, check_names, check_text, in_order

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
"""Draw the noise of a pipeline again and again.

Paper: https://example.org

Generated from pipelines/noisy.py by `noiseopt hub build`. Edit the source, not this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


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
    """bundled(files) -> the bundle of `pipelines/noisy.py` in a tree of those files."""

    def build(files):
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(source).lstrip("\n"))
        return bundle(tmp_path / "pipelines/noisy.py", tmp_path)

    return build


def test_bundle(bundled):
    assert bundled(GOOD) == BUNDLED.lstrip("\n")


def test_bundle_is_self_contained(bundled):
    program = bundled(GOOD) + "\nprint(Noisy().total() - math.pi)\n"
    run = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "1.0\n"


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
    assert bundled({"pipelines/noisy.py": source}).split('"""\n\n')[1] == textwrap.dedent(expected).lstrip("\n")


def entry(code, docstring='"""Doc."""'):
    return {"pipelines/noisy.py": f"{docstring}\n{code}\n"}


REFUSED = {
    "renamed": (entry("from .a import A as B"), "noisy.py:2: a renamed relative import"),
    "starred": (entry("from .a import *"), "noisy.py:2: a starred import"),
    "starred, third party": (entry("from math import *"), "noisy.py:2: a starred import"),
    "module of a package": (entry("from . import a"), "noisy.py:2: import names from the module that defines them"),
    "package": (
        entry("from ..rewards import A") | {"rewards/__init__.py": "from .a import A"},
        "noisy.py:2: no file rewards.py: import from the defining module",
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
    "no docstring": (entry("x = 1", docstring="# Not a docstring"), "noisy.py:1: the docstring of"),
    "other quotes": (entry("x = 1", docstring="'Doc.'"), 'noisy.py:1: a docstring ends in """'),
}


@pytest.mark.parametrize("files, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused(bundled, files, message):
    with pytest.raises(Refused) as refusal:
        bundled({"pipelines/a.py": "class A: pass\n"} | files)
    assert str(refusal.value).startswith(f"pipelines/{message}")


def test_same_third_party_name_in_two_modules(bundled):
    files = entry("from .b import B\nimport torch.nn.functional as F\nimport torch")
    source = bundled(files | {"pipelines/b.py": "import torch\nfrom torch.nn import functional as F\nclass B: pass"})
    assert source.count("import torch\n") == 1


def test_registering_folder(bundled, tmp_path):
    """All that the `__init__.py` of a folder imports is part of the bundle, since it may be asked for by name."""
    bundled(
        GOOD
        | {"rewards/__init__.py": "from .sums import RewardSum\nfrom .blueness import Blueness"}
        | {"rewards/blueness.py": "class Blueness: pass", "rewards/unused.py": "class Unused: pass"}
    )
    source = bundle(tmp_path / "pipelines/noisy.py", tmp_path, registering=tmp_path / "rewards")
    parts = ["rewards/redness.py", "rewards/sums.py", "rewards/blueness.py", "pipelines/noisy.py"]
    assert [line[2:] for line in source.splitlines() if line.startswith("# ") and line.endswith(".py")] == parts


def test_every_module_of_the_package_can_meet_every_other(root):
    """One namespace for all: any pipeline may come to import any module."""
    folders = [root / name for name in ("rewards", "schedulers", "callbacks", "pipelines")]
    paths = [path for folder in folders for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    modules = in_order(paths, root)
    check_names(modules)
    for module in modules:
        check_text(module)
