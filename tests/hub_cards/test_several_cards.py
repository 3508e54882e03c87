"""Different cards in one process, one after the other and together: from folders, from the Hub, and saved."""

import json
import shutil

import pytest

from noiseopt.hub.cards import CARDS
from noiseopt.hub.push import push


def equally_long(cards, folder, *names):
    """Copy cards, with class files of one size: Python tells files of the same second apart by their size."""
    for name in names:
        shutil.copytree(cards / name, folder / name)
    files = [folder / name / "pipeline.py" for name in names]
    for file in files:
        file.write_text(file.read_text().ljust(2000, "#"))
    assert len({file.stat().st_size for file in files}) == 1


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
    equally_long(
        root / "hub_cards", tmp_path / "equally long", "cno-stable-diffusion-xl", "noise-diffusion-stable-diffusion-xl"
    )
    arguments = [root / "hub_cards", later, tmp_path, hub.root]
    run = processes.run(root / "tests/hub_cards/several_cards.py", *arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert all(facts.values()), facts
