"""Cards as users load them: through diffusers' own download code, on tiny pipelines, against a loopback Hub."""

import json
from pathlib import Path

import pytest
from tiers import slow_except
from tiny_features import PUBLISHED_FEATURES
from tiny_rewards import PUBLISHED

from noiseopt.hub.cards import CARDS
from noiseopt.hub.push import push

ROOT = Path(__file__).parents[2]
# card: its family in `tiny_pipelines`
FAMILIES = {
    "cno-flux": "flux",
    "cno-stable-diffusion": "sd",
    "cno-stable-diffusion-3": "sd3",
    "cno-stable-diffusion-xl": "sdxl",
    "never-too-late-flux": "flux",
    "never-too-late-stable-diffusion": "sd",
    "never-too-late-turbo": "sdxl",
    "noise-diffusion-flux": "flux",
    "noise-diffusion-stable-diffusion": "sd",
    "noise-diffusion-stable-diffusion-3": "sd3",
    "noise-diffusion-stable-diffusion-xl": "sdxl",
    "reno-stable-diffusion": "sd",
    "reno-turbo": "sdxl",
}


@pytest.fixture(scope="module")
def hub(running, tmp_path_factory):
    """One Hub for all cards, with a shared download cache."""
    running.begin(tmp_path_factory.mktemp("cards") / "hub")
    return running


@pytest.fixture(scope="module")
def publish(hub):
    """publish(program): put tiny models under the Hub ids of the names in a program, each once."""
    writers = {**PUBLISHED, "dpp": PUBLISHED_FEATURES["facebook/dinov2-base"]}

    def publish_for(program):
        for name in [name for name in writers if f'"{name}"' in program]:
            writers.pop(name)(hub.root)

    return publish_for


def test_all_cards_are_loaded():
    assert sorted(card.name for card in CARDS) == sorted(FAMILIES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", slow_except(FAMILIES, "reno-turbo"))
def test_card_draws_what_the_package_draws_and_runs_its_programs(name, publish, hub, processes, api, tmp_path):
    card = next(card for card in CARDS if card.name == name)
    push(card, "someone", tag="v0.1.0", api=api)
    folder, repository = ROOT / "hub_cards" / name, f"someone/{name}"
    publish((folder / "README.md").read_text("utf-8"))
    arguments = [card.cls.__name__, FAMILIES[name], card.room, card.cls.__module__]
    arguments += [folder, repository, "v0.1.0", card.base_model, hub.root]
    run = processes.run(ROOT / "tests/hub_cards/load_card.py", *arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "might require the following packages" not in run.stdout + run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert all(facts.values()), facts
    wanted = [repository, *([] if card.room == "cno" else ["tiny/clip"])]
    assert all(any(request.startswith(f"GET /{each}/resolve/") for request in hub.requests) for each in wanted)
