"""The reward that CONTRIBUTING.md shows is added to a copy of the checkout, as it says, and meets the contract."""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_reward_of_the_guide_meets_the_contract(processes, tmp_path):
    path, line = re.search(r"here `(rewards/\w+\.py)`, and its line in `rewards/__init__.py`,\n`(.+)`", TEXT).groups()
    code = re.search(r"```python\n(.+?)```", TEXT, flags=re.DOTALL)[1]
    assert len([row for row in code.splitlines() if row.strip()]) <= 10
    for name in ("pyproject.toml", "src", "rewards", "schedulers", "callbacks", "pipelines", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name, **({"symlinks": True} if (ROOT / name).is_dir() else {}))
    (tmp_path / path).write_text(code)
    with (tmp_path / "rewards/__init__.py").open("a") as file:
        file.write(line + "\n")
    program = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["tests/rewards/contract/test_contract.py", "-k", "saturation", "-q"]
    run = processes.run(program, *arguments, folder=tmp_path, path=[tmp_path / "src", tmp_path / "tests"])
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 18
