"""A saved pipeline has its code with it: loaded again, from its folder or the Hub, it is what it was."""

import json

import pytest


@pytest.mark.slow
def test_code_goes_along(hub, processes, root, tmp_path):
    cards = [root / "hub_cards" / name for name in ("reno-stable-diffusion", "cno-stable-diffusion")]
    run = processes.run(root / "tests/hub_cards/save_card.py", *cards, tmp_path, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert all(facts.values()), facts
    pushed = {path.name for path in (hub.root / "someone/mine").iterdir()}
    assert {"README.md", "model_index.json", "pipeline.py", "noiseopt_bundle.py", "unet"} <= pushed
    for name in ("pipeline.py", "noiseopt_bundle.py"):
        assert (hub.root / "someone/mine" / name).read_bytes() == (cards[0] / name).read_bytes()
