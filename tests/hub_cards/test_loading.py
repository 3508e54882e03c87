"""Cards as users load them: through diffusers' own download code, on tiny pipelines, against a loopback Hub."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import HfApi

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
def pushed(build, hub):
    """pushed(name) -> the card, uploaded to an account on the loopback Hub."""
    api = HfApi(endpoint=hub.url, token="hf_loopback")

    def push(name):
        card = next(card for card in build.CARDS if card.name == name)
        assert build.push(card, "someone", api) == f"{hub.url}/someone/{name}"
        return card

    return push


def test_all_cards_are_loaded(build):
    assert sorted(card.name for card in build.CARDS) == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_card_draws_what_the_package_draws(name, pushed, hub, root, tmp_path):
    card = pushed(name)
    module = "noiseopt." + card.module.removesuffix(".py").replace("/", ".")
    folder = root / "hub_cards" / name
    arguments = [*CLASSES[name], card.method.name, module, folder, f"someone/{name}", hub.root]
    environment = hub.environment(tmp_path / "cache")
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root / "tests")])
    command = [sys.executable, root / "tests/hub_cards/load_card.py", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert "might require the following packages" not in run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert all(facts.values()), facts
    assert any(request.startswith(f"GET /someone/{name}/resolve/") for request in hub.requests)
    assert any(request.startswith("GET /tiny/clip/resolve/") for request in hub.requests) == card.method.takes_rewards


def test_push_replaces_and_names_the_account(pushed, hub):
    pushed("reno-turbo")
    repository = hub.root / "someone/reno-turbo"
    (repository / "pipeline.py").write_text("# of an earlier release\n")
    pushed("reno-turbo")
    assert sorted(path.name for path in repository.iterdir()) == ["README.md", "pipeline.py"]
    assert "class ReNOTurboPipeline" in (repository / "pipeline.py").read_text(encoding="utf-8")
    assert 'custom_pipeline="someone/reno-turbo"' in (repository / "README.md").read_text(encoding="utf-8")
