"""Export of the trained models to stock formats in half precision, with a record of their training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from noiseopt.shapes_world.world import SIZE

from .gallery import GENERATORS, assemble, scaled_vae
from .models import Reward
from .optimization import averaged
from .readers import CHAT_TEMPLATE, TowerTraining
from .train_readers import VLMTraining

# Training stages of each model, in order.
STAGES_OF = {
    "turbo": ("vae", "decoder", "base", "unet", "student"),
    "guided": ("vae", "decoder", "base", "unet", "guided"),
    "sdxl": ("vae", "decoder", "base", "unet", "sdxl"),
    "sdxl-turbo": ("vae", "decoder", "base", "sdxl-turbo"),
    "sd3": ("vae", "decoder", "sd3"),
    "clip": ("clip", "hardened", "refined"),
    "dinov2": ("dinov2",),
    "vqa": ("vqa",),
}


def processor_of(size: int) -> dict[str, Any]:
    """Return the configuration of the image processor of readers of a size in pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "do_convert_rgb": True,
    }


def export(args: argparse.Namespace) -> None:
    """Write every finished model to the folder `weights`."""
    folder = args.output / "weights"
    for name, (stage, _) in GENERATORS.items():
        if (args.output / f"{stage}.pt").exists():
            assemble(args, name, scaled_vae(args)).to(torch.float16).save_pretrained(folder / name)
    export_clip(args, folder / "clip")
    if (args.output / "dinov2.pt").exists():
        tower = averaged(args.output / "dinov2.pt", TowerTraining()).tower
        tower.half().save_pretrained(folder / "dinov2")
        write_json(folder / "dinov2/preprocessor_config.json", processor_of(SIZE))
    if (args.output / "vqa.pt").exists():
        export_vqa(averaged(args.output / "vqa.pt", VLMTraining()), folder / "vqa")
    finish(folder)
    for path in folder.iterdir():
        training = training_of(args, path.name)
        write_json(path / "training.json", training)
        draw_curves(training["stages"], path / "learning_curve.png")


def finish(folder: Path) -> None:
    """Correct the configurations of exported models."""
    for path in folder.glob("**/config.json"):  # weights are stored in half, but run in single precision
        path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for path in folder.glob("*/vae/config.json"):
        config = json.loads(path.read_text())
        config.pop("block_out_channels", None)  # which `AutoencoderTiny` saves, and calls unexpected when it is loaded
        path.write_text(json.dumps(config, indent=2) + "\n")


def export_clip(args: argparse.Namespace, folder: Path) -> None:
    """Write the reward of the last training stage that has run."""
    path = next(p for p in (args.output / f"{s}.pt" for s in ("refined", "hardened", "clip")) if p.exists())
    export_reward(averaged(path, Reward()), folder, SIZE)


def export_reward(reward: Reward, folder: Path, size: int) -> None:
    """Write a reward with its processors."""
    reward.clip.half().save_pretrained(folder)
    reward.tokenizer.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", processor_of(size))


def export_vqa(model: VLMTraining, folder: Path, size: int = SIZE) -> None:
    """Write the vision-language model with its processor."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    model.vlm.half().save_pretrained(folder)
    settings = {key: value for key, value in processor_of(size).items() if key != "image_processor_type"}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**settings),
        tokenizer=model.tokenizer,
        patch_size=size // 8,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


def training_of(
    args: argparse.Namespace, name: str, stages_of: Mapping[str, Sequence[str]] = STAGES_OF
) -> dict[str, Any]:
    """Return the training record of a model from the checkpoints of its stages."""
    stages = []
    for stage in stages_of[name]:
        path = args.output / f"{stage}.pt"
        if path.exists():
            state = torch.load(path)
            parameters = sum(tensor.numel() for tensor in state["model"].values() if tensor.is_floating_point())
            kept = {key: state[key] for key in ("batch", "seconds", "curve")}
            stages.append({"stage": stage, "samples": state["seen"], "parameters": parameters} | kept)
    machine = {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__.split("+")[0]}
    return {"stages": stages, "pictures": args.pictures, "seed": 0} | machine


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def draw_curves(stages: list[dict[str, Any]], path: Path) -> None:
    """Plot the losses of each stage against its samples, side by side."""
    from matplotlib.figure import Figure

    stages = [stage for stage in stages if len(stage["curve"]) > 1]
    if not stages:
        return
    figure = Figure(figsize=(3.2 * len(stages), 2.8), dpi=120, layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        values = []
        for name in [key for key in stage["curve"][-1] if key not in ("samples", "seconds")]:
            points = [(point["samples"] / 1000, point[name]) for point in stage["curve"] if name in point]
            values += [value for _, value in points]
            axes.plot(*zip(*points, strict=True), label=name)
        wide = max(values) > 10 * min(values) > 0
        axes.set(title=stage["stage"], xlabel="thousand samples", yscale="log" if wide else "linear")
        axes.legend(fontsize=7)
    figure.savefig(path)
