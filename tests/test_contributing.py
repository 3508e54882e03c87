"""The reward and the method of CONTRIBUTING.md are added to a copy of the checkout, and meet their contracts."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(
    r"here `((\w+)/\w+/\w+\.py)`, and its line in `\w+/__init__\.py`,\n`(.+?)`.*?```python\n(.+?)```",
    TEXT,
    flags=re.DOTALL,
)
CONTRACTS = {
    "rewards": ("tests/rewards/contract/test_contract.py", "saturation", 10, 10),
    "pipelines": ("tests/pipelines/test_method.py", "sign_ascent", 24, 2),
}


@pytest.mark.parametrize("folder", CONTRACTS)
def test_the_example_of_the_guide_meets_the_contract(folder, processes, tmp_path):
    (example,) = [example for example in EXAMPLES if example[1] == folder]
    path, _, line, code = example
    tests, name, most_lines, least_passed = CONTRACTS[folder]
    assert len([row for row in code.splitlines() if row.strip()]) <= most_lines
    for part in ("pyproject.toml", "src", "rewards", "schedulers", "callbacks", "pipelines", "tests"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part, **({"symlinks": True} if (ROOT / part).is_dir() else {}))
    (tmp_path / path).write_text(code, encoding="utf-8")
    with (tmp_path / folder / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    program = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = [tests, "-k", name, "-q", "-n", "0", "-m", "slow or not slow"]
    run = processes.run(program, *arguments, folder=tmp_path, path=[tmp_path / "src", tmp_path / "tests"])
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= least_passed
