"""Export of the trained models to stock formats in half precision, with a record of their training."""

from __future__ import annotations

import argparse

import torch

from ..export import draw_curves, export_reward, export_vqa, finish, processor_of, training_of, write_json
from ..optimization import averaged
from ..readers import TowerTraining
from ..train_readers import VLMTraining
from .data import SIZE
from .gallery import FAMILIES, assemble
from .readers import HalfReward

_TEACHER = ("vae", "decoder", "base", "guided")
STAGES_OF = {  # training stages of each model, in order
    "turbo": (*_TEACHER, "turbo"),
    "guided": _TEACHER,
    "sdxl": (*_TEACHER, "sdxl"),
    "sdxl-turbo": (*_TEACHER, "turbo", "sdxl-turbo"),
    "sd3": ("vae", "decoder", "sd3"),
    "clip": ("eyes", "clip", "refined"),
    "dinov2": ("dinov2",),
    "vqa": ("eyes", "vqa"),
}


def export(args: argparse.Namespace) -> None:
    """Write every finished model to the folder `weights`."""
    folder = args.output / "weights"
    for name in FAMILIES:
        if (args.output / f"{name}.pt").exists():
            assemble(args, name).to(torch.float16).save_pretrained(folder / name)
    rewards = [path for path in (args.output / f"{stage}.pt" for stage in ("refined", "clip")) if path.exists()]
    if rewards:
        export_reward(averaged(rewards[0], HalfReward()), folder / "clip", SIZE)
    if (args.output / "dinov2.pt").exists():
        averaged(args.output / "dinov2.pt", TowerTraining(SIZE)).tower.half().save_pretrained(folder / "dinov2")
        write_json(folder / "dinov2/preprocessor_config.json", processor_of(SIZE))
    if (args.output / "vqa.pt").exists():
        export_vqa(averaged(args.output / "vqa.pt", VLMTraining(SIZE)), folder / "vqa", SIZE)
    finish(folder)
    for path in folder.iterdir():
        training = training_of(args, path.name, STAGES_OF)
        write_json(path / "training.json", training)
        draw_curves(training["stages"], path / "learning_curve.png")
