"""Cards as users load them: through diffusers' own download code, on tiny pipelines, against a loopback Hub."""

import json
import os
import subprocess
import sys

import pytest
from tiny_features import PUBLISHED_FEATURES
from tiny_rewards import PUBLISHED

from noiseopt.hub.cards import CARDS
from noiseopt.hub.push import push

# card -> its class and its family in `tiny_pipelines`
CLASSES = {
    "cno-flux": ("CNOFluxPipeline", "flux"),
    "cno-stable-diffusion": ("CNOStableDiffusionPipeline", "sd"),
    "cno-stable-diffusion-3": ("CNOStableDiffusion3Pipeline", "sd3"),
    "cno-stable-diffusion-xl": ("CNOStableDiffusionXLPipeline", "sdxl"),
    "never-too-late-flux": ("NeverTooLateFluxPipeline", "flux"),
    "never-too-late-stable-diffusion": ("NeverTooLateStableDiffusionPipeline", "sd"),
    "never-too-late-turbo": ("NeverTooLateTurboPipeline", "sdxl"),
    "noise-diffusion-flux": ("NoiseDiffusionFluxPipeline", "flux"),
    "noise-diffusion-stable-diffusion": ("NoiseDiffusionStableDiffusionPipeline", "sd"),
    "noise-diffusion-stable-diffusion-3": ("NoiseDiffusionStableDiffusion3Pipeline", "sd3"),
    "noise-diffusion-stable-diffusion-xl": ("NoiseDiffusionStableDiffusionXLPipeline", "sdxl"),
    "reno-stable-diffusion": ("ReNOStableDiffusionPipeline", "sd"),
    "reno-turbo": ("ReNOTurboPipeline", "sdxl"),
}


@pytest.fixture
def publish(hub):
    """publish(program) -> tiny models under the Hub ids of what a program of a card asks for by name."""

    def publish_for(program):
        for name, write in PUBLISHED.items():
            if f'"{name}"' in program:
                write(hub.root)
        if '"dpp"' in program:
            PUBLISHED_FEATURES["facebook/dinov2-base"](hub.root)

    return publish_for


def test_all_cards_are_loaded():
    assert sorted(card.name for card in CARDS) == sorted(CLASSES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_card_draws_what_the_package_draws_and_runs_its_programs(name, publish, hub, api, root, tmp_path):
    card = next(card for card in CARDS if card.name == name)
    push(card, "someone", tag="v0.1.0", api=api)
    publish(card.method.example)
    module = "noiseopt." + card.module.removesuffix(".py").replace("/", ".")
    folder, repository = root / "hub_cards" / name, f"someone/{name}"
    arguments = [*CLASSES[name], card.method.name, module, folder, repository, "v0.1.0", card.base_model, hub.root]
    environment = hub.environment(tmp_path / "cache")
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root / "tests")])
    command = [sys.executable, root / "tests/hub_cards/load_card.py", *arguments]
    (tmp_path / "run").mkdir()
    run = subprocess.run(command, env=environment, cwd=tmp_path / "run", capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "might require the following packages" not in run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert all(facts.values()), facts
    assert any(request.startswith(f"GET /{repository}/resolve/") for request in hub.requests)
    assert any(request.startswith("GET /tiny/clip/resolve/") for request in hub.requests) == card.method.takes_rewards
