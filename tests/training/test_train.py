"""One command trains, exports and reports every model."""

import dataclasses

import pytest
from diffusers import DiffusionPipeline

from noiseopt import shapes_world
from noiseopt.rewards import AutoReward
from training import distillation, drawing, teacher, train

PROMPTS = ["a red circle", "a blue star left of a green cross"]


@pytest.mark.slow
def test_one_command_trains_every_stage(tmp_path, monkeypatch):
    small = {"pictures": 250, "latents": 250, "pairs": 64, "failures": 64, "gallery": 256}
    small |= {"report-prompts": 4, "report-seeds": 1, "report-sets": 2, "report-pictures": 16}
    small |= {f"{stage}-samples": 64 for stage in train.SAMPLES}
    for name, family in drawing.FAMILIES.items():
        call = {**family.call, "num_inference_steps": 1}
        monkeypatch.setitem(drawing.FAMILIES, name, dataclasses.replace(family, call=call))
    monkeypatch.setattr(distillation, "PART", 64)
    monkeypatch.setattr(teacher, "look", lambda *args, **call: None)  # the students' remains, which is fast
    stages = [stage for stage in train.STAGES if stage != "refined"]  # which needs a model that can draw
    arguments = [word for name, count in small.items() for word in (f"--{name}", str(count))]
    train.main(["--output", str(tmp_path), *arguments, "--stages", *stages])
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert names == set(shapes_world.MODELS)
    for name in names:
        assert (tmp_path / "weights" / name / "training.json").exists()
        assert (tmp_path / "weights" / name / "metrics.json").exists()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "weights/sd3")
    images = pipe(PROMPTS[0], num_inference_steps=2, max_sequence_length=16, output_type="pt").images
    assert images.shape == (1, 3, 128, 128)
    reward = AutoReward.from_pretrained(tmp_path / "weights/clip")
    assert reward(images, PROMPTS[:1]).shape == (1,)
    assert list(tmp_path.glob("turbo_*.png"))
