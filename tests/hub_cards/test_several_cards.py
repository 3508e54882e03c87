"""Different cards in one process, one after the other and together: from folders, from the Hub, and saved."""

import json
import shutil
from pathlib import Path

import pytest

from noiseopt import shapes_world
from noiseopt.hub.cards import CARDS
from noiseopt.hub.push import push


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_cards_of_one_process_do_not_disturb_each_other(hub, processes, root, api, tmp_path):
    for card in CARDS:
        if card.name.endswith("stable-diffusion"):
            push(card, "someone", api=api)
    later = tmp_path / "later"
    shutil.copytree(root / "hub_cards/reno-stable-diffusion", later)  # copies what the link points to
    source = (later / "noiseopt_bundle.py").read_text(encoding="utf-8")
    start = source.index("    def save_config(")
    method = "    def from_later_release(self):\n        return 2\n\n"
    head = source[: source.index('"""', 3)]
    shorter = head[: -len(method)] + source[len(head) : start] + method + source[start:]
    assert len(shorter) == len(source)
    (later / "noiseopt_bundle.py").write_text(shorter, encoding="utf-8")
    shutil.copytree(later, hub.root / "someone/later")
    arguments = [root / "hub_cards", later, tmp_path, hub.root]
    run = processes.run(root / "tests/hub_cards/several_cards.py", *arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert all(facts.values()), facts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_card_loads_after_every_other_from_folders(processes, root, tmp_path):
    """All that fit an embedded model, as in a notebook that tries one after the other, then the first again."""
    cards = [
        {
            "folder": str(root / "hub_cards" / card.name),
            "room": card.room,
            "class": card.cls.__name__,
            "weights": shapes_world.path(card.shown_on),
            "call": dict(shapes_world.MODELS[card.shown_on].call),
        }
        for card in CARDS
        if card.stock.__name__ == pipeline_of(card.shown_on)
    ]
    assert len(cards) == len(CARDS) - 3  # there is no embedded FLUX
    run = processes.run(root / "tests/hub_cards/embedded_cards.py", json.dumps(cards), folder=tmp_path)
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert all(facts.values()), facts


def pipeline_of(name):
    """Return the name of the pipeline class of an embedded model."""
    return json.loads((Path(shapes_world.path(name)) / "model_index.json").read_text())["_class_name"]
