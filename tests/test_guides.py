"""The guides: their examples run on the embedded models, and their figures are those of the recorded results."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
SEEDS = (ROOT / "docs/guides/seeds-that-differ.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_examples_run_one_after_the_other(path):
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(path), "exec"), names)
    if path.stem == "seeds-that-differ":
        assert len(names["images"]) == 4 and names["near"].noise.shape == names["found"].noise.shape


@pytest.mark.parametrize("path", [*GUIDES, ROOT / "docs/embedded-models.md"], ids=lambda path: path.stem)
def test_files_and_commands_are_there(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
    for script in re.findall(r"python (benchmarks/\S+\.py)", text):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize(
    ("results", "heading"),
    [
        ("seeds_that_differ", "60 held-out prompts on the embedded one-step"),
        ("seeds_that_differ_guided", "60 held-out prompts on the many-step"),
    ],
)
def test_the_table_of_seeds_is_that_of_the_results(results, heading):
    rows = json.loads((ROOT / f"benchmarks/results/{results}.json").read_text(encoding="utf-8"))["rows"]
    table = SEEDS[SEEDS.index(heading) :].partition("\n\n|")[2].partition("\n\n")[0].replace("*", "").splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    shown = {
        name.partition(",")[0] if name.startswith("Div") else name.removesuffix(" noise"): cells
        for name, *cells in lines
    }
    assert set(shown) == set(rows) and all(len(row) == 60 for row in rows.values())
    for name, cells in shown.items():
        numbers = torch.tensor([float(re.match(r"[\d.]+", cell)[0]) for cell in cells])  # pyright: ignore[reportOptionalSubscript]
        keys = ("MSS", "right", "grounds", "positions", "seconds")
        means = torch.tensor([torch.tensor([row[key] for row in rows[name].values()]).nanmean() for key in keys])
        means[1] *= 100
        assert ((numbers - means).abs() <= torch.tensor([0.005, 0.5, 0.005, 0.5, 0.05]) * 1.001).all(), name
