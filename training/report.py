"""Metrics of the exported models on validation prompts, written beside their weights."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from noiseopt.shapes_world.captions import CATEGORIES, VALIDATION_PROMPTS, caption, category, parse, sample_scene
from noiseopt.shapes_world.embedded import MODELS
from noiseopt.shapes_world.judge import judge
from noiseopt.shapes_world.world import render

from .export import write_json
from .gallery import GENERATORS
from .negatives import wrong_request
from .optimization import averaged
from .readers import TowerTraining
from .train_readers import tower_targets


def report(args: argparse.Namespace) -> None:
    """Write `metrics.json` for each exported model."""
    folder = args.output / "weights"
    drawn = {name: draw_all(folder / name, args) for name in GENERATORS if (folder / name).is_dir()}
    for name, (images, prompts) in drawn.items():
        right = [v.correct for v in judge(images, prompts)]
        found = shares(prompts, right) | {"right after the autoencoder": kept(folder / name, args.report_pictures)}
        record(folder / name, found | {"call": dict(MODELS[name].call)}, args)
    truth = {name: torch.tensor([v.correct for v in judge(*pair)]) for name, pair in drawn.items()}
    for name, reward in readers(folder).items():
        scores = {source: scored(reward, *pair) for source, pair in drawn.items()}
        found = judged(scores, truth, folder / name)
        if name == "vqa":
            found |= {"prefers a true to a nearly true caption": preference(reward, args.report_pictures)}
        record(folder / name, found, args)
    if (args.output / "dinov2.pt").exists():
        record(folder / "dinov2", tower_accuracy(args), args)


def record(folder: Path, found: dict[str, Any], args: argparse.Namespace) -> None:
    """Write and print the metrics of a model."""
    found = {"prompts": "validation", "count": args.report_prompts, "seeds": args.report_seeds} | found
    write_json(folder / "metrics.json", found)
    print(folder.name, {key: value for key, value in found.items() if key != "calibration"}, flush=True)


def draw_all(folder: Path, args: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """Generate images of the validation prompts, with one generator per image."""
    from diffusers import DiffusionPipeline

    model = MODELS[folder.name]
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = list(VALIDATION_PROMPTS[: args.report_prompts]) * args.report_seeds
    images = []
    for start in tqdm(range(0, len(prompts), 34), desc=folder.name):
        part = prompts[start : start + 34]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images.append(pipe(part, generator=generators, output_type="pt", **model.call).images.cpu())
    return torch.cat(images), prompts


@torch.no_grad()
def kept(folder: Path, count: int) -> float:
    """Return the share of `count` rendered images that are still right after the autoencoder."""
    from diffusers import AutoencoderTiny

    vae: Any = AutoencoderTiny.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    rng = random.Random(98)
    scenes = [sample_scene(rng) for _ in range(count)]
    images = render(scenes, torch.Generator().manual_seed(98))
    again = vae.decode(vae.encode(images * 2 - 1).latents).sample / 2 + 0.5
    right = judge(again.clamp(0, 1), [caption(scene, rng) for scene in scenes])
    return round(sum(v.correct for v in right) / len(right), 3)


def shares(prompts: Sequence[str], right: Sequence[bool]) -> dict[str, Any]:
    """Return the shares of right images: over all prompts, by category, and for prompts with two different objects."""
    groups = {"all": list(right)}
    for name in CATEGORIES:
        groups[name] = [r for p, r in zip(prompts, right, strict=True) if category(p) == name]
    two = groups["binding"] + groups["position"]
    found = {name: round(sum(group) / len(group), 3) for name, group in groups.items() if group}
    return {"right": found, "two objects": round(sum(two) / len(two), 3)}


def readers(folder: Path) -> dict[str, Any]:
    """Return the exported models that score how well an image fits a prompt."""
    from noiseopt.rewards.preference.clip_score import CLIPScore
    from noiseopt.rewards.vlm.vqa_score import VQAScorer

    found: dict[str, Any] = {"clip": CLIPScore.from_pretrained(str(folder / "clip"))}
    return found | ({"vqa": VQAScorer.from_pretrained(str(folder / "vqa"))} if (folder / "vqa").is_dir() else {})


@torch.no_grad()
def scored(reward: Any, images: Tensor, prompts: list[str]) -> Tensor:
    """Score images in small batches, (B,)."""
    parts = [reward(images[i : i + 32], prompts[i : i + 32]) for i in range(0, len(images), 32)]
    return torch.cat(parts)


def preference(reward: Any, count: int) -> float:
    """Return the share of `count` rendered images whose caption scores above a nearly right one."""
    rng = random.Random(97)
    scenes = [sample_scene(rng) for _ in range(count)]
    images, prompts = render(scenes, torch.Generator().manual_seed(97)), [caption(scene, rng) for scene in scenes]
    wrong = [str(wrong_request(parse(prompt), rng)) for prompt in prompts]
    return round(float((scored(reward, images, prompts) > scored(reward, images, wrong)).float().mean()), 3)


def auc(right: Tensor, wrong: Tensor) -> float:
    """Return the probability that a right image scores above a wrong one."""
    return float((right[:, None] > wrong).float().mean()) if len(right) and len(wrong) else math.nan


def judged(scores: dict[str, Tensor], truth: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """Return the AUC by generator and overall; for probabilities also their calibration."""
    scores, truth = ({**each, "all": torch.cat(list(each.values()))} for each in (scores, truth))
    found: dict[str, Any] = {"auc": {n: round(auc(scores[n][truth[n]], scores[n][~truth[n]]), 3) for n in scores}}
    if folder.name == "vqa":
        bins = calibration(scores["all"], truth["all"])
        gap = sum(b["count"] * abs(b["mean"] - b["right"]) for b in bins) / len(scores["all"])
        found |= {"calibration": bins, "ece": round(gap, 4)}
        found["accuracy"] = round(float(((scores["all"] > 0.5) == truth["all"]).float().mean()), 4)
        draw_reliability(bins, folder / "reliability.png")
    return found


def calibration(probability: Tensor, truth: Tensor, count: int = 10) -> list[dict[str, float]]:
    """Return the mean probability and share of right images in equal-width bins, without empty ones."""
    which = (probability * count).long().clamp(max=count - 1)
    rows = []
    for i in range(count):
        inside = which == i
        if inside.any():
            means = {"mean": float(probability[inside].mean()), "right": float(truth[inside].float().mean())}
            row = {"low": i / count, "high": (i + 1) / count} | {key: round(value, 4) for key, value in means.items()}
            rows.append(row | {"count": int(inside.sum())})
    return rows


def draw_reliability(bins: list[dict[str, float]], path: Path) -> None:
    """Plot the share of right images against the predicted probability."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#8c959f", linewidth=1)
    axes.plot([b["mean"] for b in bins], [b["right"] for b in bins], marker="o")
    for b in bins:
        axes.annotate(str(b["count"]), (b["mean"], b["right"]), textcoords="offset points", xytext=(6, -10), fontsize=7)
    axes.set(xlabel='P("yes")', ylabel="share of right pictures", xlim=(0, 1), ylim=(0, 1))
    figure.savefig(path)


@torch.no_grad()
def tower_accuracy(args: argparse.Namespace) -> dict[str, float]:
    """Return the accuracy of the image encoder's heads on new images."""
    model = averaged(args.output / "dinov2.pt", TowerTraining())
    rng = random.Random(99)
    scenes = [sample_scene(rng) for _ in range(args.report_pictures)]
    shown, counts, where = tower_targets(scenes)
    patch, count, place, _, _ = model(render(scenes, torch.Generator().manual_seed(99)))
    right = {"patch accuracy": patch.argmax(-1) == shown, "place accuracy": (place > 0) == (where > 0)}
    right["pictures with all counts right"] = (count.argmax(1) == counts).all(1)
    return {name: round(float(value.float().mean()), 4) for name, value in right.items()}
