"""Export of the trained models to stock formats in half precision, with a record of their training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save

from noiseopt.shapes_world.world import SIZE

from .drawing import FAMILIES, assemble
from .optimization import averaged, last_of
from .questions import CHAT_TEMPLATE
from .readers import PATCH, Reward, TowerTraining, VLMTraining

_TEACHER = ("vae", "decoder", "base", "guided")
STAGES_OF = {  # training stages of each model, in order
    "turbo": (*_TEACHER, "turbo"),
    "guided": _TEACHER,
    "sdxl": (*_TEACHER, "sdxl"),
    "sdxl-turbo": (*_TEACHER, "turbo", "sdxl-turbo"),
    "sd3": ("vae", "decoder", "base", "sd3"),
    "clip": ("eyes", "clip", "refined"),
    "dinov2": ("dinov2",),
    "vqa": ("eyes", "vqa"),
}
PROCESSOR: dict[str, Any] = {  # of the pictures that readers see
    "do_resize": True,
    "size": {"shortest_edge": SIZE},
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
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
    for name in FAMILIES:
        if (args.output / f"{name}.pt").exists():
            assemble(args, name).to(torch.float16).save_pretrained(folder / name)
    if path := last_of(args.output, "clip", "refined"):
        reward = averaged(path, Reward())
        reward.clip.half().save_pretrained(folder / "clip")
        reward.tokenizer.save_pretrained(folder / "clip")
        write_processor(folder / "clip")
    if (args.output / "dinov2.pt").exists():
        averaged(args.output / "dinov2.pt", TowerTraining()).tower.half().save_pretrained(folder / "dinov2")
        write_processor(folder / "dinov2")
    if (args.output / "vqa.pt").exists():
        export_vqa(averaged(args.output / "vqa.pt", VLMTraining()), folder / "vqa")
    for path in folder.glob("**/config.json"):
        correct(path)
    for path in folder.glob("**/*.safetensors"):
        shorten(path)
    for path in folder.iterdir():
        training = training_of(args, path.name)
        write_json(path / "training.json", training)
        draw_curves(training["stages"], path / "learning_curve.png")


def export_vqa(model: VLMTraining, folder: Path) -> None:
    """Write the vision-language model with its processor."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    model.vlm.half().save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**PROCESSOR),
        tokenizer=model.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


def write_processor(folder: Path) -> None:
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"} | PROCESSOR)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def correct(path: Path) -> None:
    """Correct the configuration of an exported model."""
    # weights are stored in half, but run in single precision
    config = json.loads(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    if path.parent.name == "vae":
        config.pop("block_out_channels", None)  # which `AutoencoderTiny` saves, and calls unexpected when it is loaded
    path.write_text(json.dumps(config, indent=2) + "\n")


def shorten(path: Path) -> None:
    """Round weights in half precision to 10 significant bits, for a wheel that is smaller by 5%."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load(path.read_bytes())
    for weight in weights.values():
        if weight.dtype == torch.float16:  # sign, 5 bits of the exponent, 10 of 11 significant ones
            bits = weight.view(torch.int16)
            bits.copy_((bits + 1) & -2)
    path.write_bytes(save(weights, metadata))


def training_of(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the training record of a model from the checkpoints of its stages."""
    stages = []
    for stage in STAGES_OF[name]:
        path = args.output / f"{stage}.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu")
            parameters = sum(tensor.numel() for tensor in state["model"].values() if tensor.is_floating_point())
            kept = {key: state[key] for key in ("batch", "seconds", "curve")}
            stages.append({"stage": stage, "samples": state["seen"], "parameters": parameters} | kept)
    machine = {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__.split("+")[0]}
    pictures = args.latents if name in FAMILIES else args.pictures
    if name == "dinov2":  # new ones, in two views each
        pictures = stages[0]["samples"] // 2
    return {"stages": stages, "pictures": pictures, "seed": 0} | machine


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
