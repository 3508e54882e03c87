"""The assembled pipelines: where their sampling begins."""

import argparse
from pathlib import Path

from training import drawing
from training.autoencoder import new_vae
from training.generators import SDGenerator


def test_a_guided_model_begins_where_the_noisy_image_says_something_and_a_one_step_model_at_the_end(monkeypatch):
    monkeypatch.setattr(drawing, "averaged", lambda path, model: model)
    monkeypatch.setattr(drawing, "final_vae", lambda args: new_vae())
    args = argparse.Namespace(output=Path("unused"), device="cpu")
    assert drawing.FAMILIES["guided"].kind is drawing.FAMILIES["turbo"].kind is SDGenerator
    first = {}
    for name in ("guided", "turbo"):
        scheduler = drawing.assemble(args, name).scheduler
        scheduler.set_timesteps(drawing.FAMILIES[name].call["num_inference_steps"])
        first[name] = int(scheduler.timesteps[0])
        signal = float(scheduler.alphas_cumprod[first[name]])
        assert signal > 1e-4 if name == "guided" else signal == 0
    assert first == {"guided": 951, "turbo": 999}
