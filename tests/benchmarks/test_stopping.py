"""Rules of `benchmarks/stopping.py` on scores whose outcome is known."""

import json

import pytest
import torch
from stopping import Runs, main  # pyright: ignore[reportMissingImports]

REWARD = torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 1.0], [3.0, 2.0], [4.0, 4.0]])
HELD_OUT = torch.tensor([[0.0, 5.0], [2.0, 1.0], [2.0, 1.0], [1.0, 1.0], [3.0, 9.0]])
RIGHT = torch.tensor([[0, 0], [1, 1], [1, 0], [0, 0], [0, 1]])


def runs() -> Runs:
    return Runs({"reward": REWARD, "views": REWARD, "held-out": HELD_OUT}, RIGHT, 0.1, {"held-out": 0.1, "views": 0.0})


def test_a_run_ends_once_a_score_has_not_risen():
    assert runs().patient("held-out", 2).tolist() == [3, 2]  # an equal score is no rise
    assert runs().patient("held-out", 4).tolist() == [4, 4]
    assert runs().patient("reward", 1).tolist() == [4, 2]


def test_the_best_is_chosen_up_to_the_end():
    assert runs().best("reward", torch.tensor([1, 3])).tolist() == [1, 1]
    assert runs().best("held-out", torch.tensor([3, 3])).tolist() == [1, 0]


def test_a_rule_is_compared_with_the_reward_in_as_many_seconds():
    found = runs().outcome("reward", torch.tensor([1, 2]), "held-out")
    assert found["evaluations"] == 2.5 and found["seconds"] == pytest.approx(0.5)
    assert found["right"]["value"] == 1.0
    assert found["gain"]["value"] == pytest.approx(1.0 - 0.5)  # 5 evaluations without reading: steps 4 and 4


@pytest.mark.slow
def test_a_short_run_writes_its_rules(tmp_path, capsys):
    main(["--limit", "2", "--steps", "6", "--output", str(tmp_path / "stopping.json")])
    rules = json.loads((tmp_path / "stopping.json").read_text())["rules"]
    assert "| 5 evaluations, best views |" in capsys.readouterr().out
    assert rules["held-out not risen for 3, best views"]["evaluations"] >= 4
    assert rules["5 evaluations, best views"]["evaluations"] == 5
