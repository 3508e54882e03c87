"""Metrics of the exported models on validation prompts, written beside their weights."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import AutoReward, ImageFeatures
from noiseopt.shapes_world.captions import CATEGORIES, VALIDATION_PROMPTS, caption, category, parse, sample_request
from noiseopt.shapes_world.judge import judge

from .distillation import halved
from .drawing import FAMILIES, denoiser_of
from .export import write_json
from .generators import CHANNELS, SIDE
from .naturalness import collapse, gradient_shares, gradients, new_pictures
from .negatives import wrong_request
from .optimization import averaged
from .precision import HalfPrecision
from .readers import TowerTraining, tower_targets

SET = 6  # images of a prompt whose diversity is measured


def report(args: argparse.Namespace) -> None:
    """Write `metrics.json` for each exported model."""
    folder = args.output / "weights"
    readers = load_readers(folder)
    prompts = list(VALIDATION_PROMPTS[: args.report_prompts]) * args.report_seeds
    few = list(VALIDATION_PROMPTS[: args.report_sets])
    drawn, truth = {}, {}
    for name in [name for name in FAMILIES if (folder / name).is_dir()]:
        images = draw_all(folder / name, prompts + [prompt for prompt in few for _ in range(SET)], args)
        drawn[name] = images[: len(prompts)]
        verdicts = judge(drawn[name], prompts)
        truth[name] = torch.tensor([v.correct for v in verdicts])
        pipe = load_pipeline(folder / name)
        found = {
            "call": FAMILIES[name].call,
            "right": shares(prompts, truth[name].tolist()),
            "shapes right": round(sum(v.shape_bound for v in verdicts) / len(verdicts), 3),
            "right after the autoencoder": kept(pipe.vae, args.report_pictures),
            "channel means": channel_means(pipe, few, readers, **FAMILIES[name].call),
        }
        if "dinov2" in readers:
            found["collapse"] = collapse(images[len(prompts) :], few, SET, readers["dinov2"])
        record(folder / name, found, args)
    for name in [name for name in ("clip", "vqa") if name in readers]:
        scores = {source: scored(readers[name], drawn[source], prompts) for source in drawn}
        found = judged(scores, truth) | (calibrated(scores, truth, folder / name) if name == "vqa" else {})
        found["prefers a true to a nearly true caption"] = preference(readers[name], args.report_pictures)
        record(folder / name, found, args)
    if "dinov2" in readers:
        record(folder / "dinov2", tower_accuracy(args), args)


def record(folder: Path, found: dict[str, Any], args: argparse.Namespace) -> None:
    """Write and print the metrics of a model."""
    found = {"prompts": "validation", "count": args.report_prompts, "seeds": args.report_seeds} | found
    write_json(folder / "metrics.json", found)
    print(folder.name, {key: value for key, value in found.items() if key != "calibration"}, flush=True)


def load_readers(folder: Path) -> dict[str, Any]:
    """Return the exported readers by name."""
    kinds = {"clip": AutoReward, "vqa": AutoReward, "dinov2": ImageFeatures}
    return {name: kind.from_pretrained(str(folder / name)) for name, kind in kinds.items() if (folder / name).is_dir()}


def load_pipeline(folder: Path) -> Any:
    """Load an exported generator in single precision."""
    from diffusers import DiffusionPipeline

    with quiet_libraries():
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw_all(folder: Path, prompts: Sequence[str], args: argparse.Namespace, seed: int = 0) -> Tensor:
    """Generate an image of each prompt, (N, 3, 128, 128) in [0, 1], from seeds that count up from `seed`."""
    pipe = load_pipeline(folder).to(args.device)
    with quiet_libraries():
        halved(denoiser_of(pipe), args.dtype)
    images = []
    for start in tqdm(range(0, len(prompts), 32), desc=folder.name, mininterval=5):
        part = list(prompts[start : start + 32])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        with HalfPrecision():
            output = pipe(part, generator=generators, output_type="pt", **FAMILIES[folder.name].call)
        images.append(output.images.cpu())
    return torch.cat(images)


def shares(prompts: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    """Return the shares of right images: over all prompts, and by category."""
    groups = {"all": list(right)}
    for name in CATEGORIES:
        groups[name] = [r for p, r in zip(prompts, right, strict=True) if category(p) == name]
    return {name: round(sum(group) / len(group), 3) for name, group in groups.items() if group}


@torch.no_grad()
def kept(vae: Any, count: int) -> float:
    """Return the share of `count` training pictures that are still right after the autoencoder."""
    images, prompts = captioned(count, seed=98)
    again = [vae.decode(vae.encode(part * 2 - 1).latents).sample / 2 + 0.5 for part in images.split(32)]
    right = judge(torch.cat(again).clamp(0, 1), prompts)
    return round(sum(v.correct for v in right) / count, 3)


def captioned(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Draw training pictures, and write a true caption of each."""
    rng = random.Random(seed)
    images, scenes = new_pictures([sample_request(rng) for _ in range(count)], seed)
    return images, [caption(scene, rng) for scene in scenes]


def channel_means(pipe: Any, prompts: list[str], readers: Mapping[str, Any], **call: Any) -> dict[str, Any]:
    """Return `gradient_shares` for a score of pixels that has no mean of its own and, if exported, for the reward."""
    scores: dict[str, Any] = {"brightness, left minus right": lambda images, _: left_minus_right(images)}
    scores |= {"reward": readers["clip"]} if "clip" in readers else {}
    noise = torch.randn(len(prompts), CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(95))
    found = {}
    for name, score in scores.items():
        parts = [
            gradients(pipe, denoiser_of(pipe), prompts[i : i + 4], noise[i : i + 4], score, **call)
            for i in range(0, len(prompts), 4)
        ]
        full, frozen = (torch.cat(each) for each in zip(*parts, strict=True))
        found[name] = gradient_shares(full, frozen)
    return found


def left_minus_right(images: Tensor) -> Tensor:
    """Return how much brighter the left half of images (B, 3, H, W) is than the right half, (B,)."""
    left, right = images.chunk(2, -1)
    return (left - right).mean((1, 2, 3))


@torch.no_grad()
def scored(reward: Any, images: Tensor, prompts: list[str]) -> Tensor:
    """Score images in small batches, (B,)."""
    parts = [reward(images[i : i + 32], prompts[i : i + 32]) for i in range(0, len(images), 32)]
    return torch.cat(parts)


def preference(reward: Any, count: int) -> float:
    """Return the share of `count` training pictures whose caption scores above a nearly right one."""
    images, prompts = captioned(count, seed=97)
    rng = random.Random(97)
    wrong = [str(wrong_request(parse(prompt), rng)) for prompt in prompts]
    return round(float((scored(reward, images, prompts) > scored(reward, images, wrong)).float().mean()), 3)


def auc(right: Tensor, wrong: Tensor) -> float:
    """Return the probability that a right image scores above a wrong one."""
    return float((right[:, None] > wrong).float().mean()) if len(right) and len(wrong) else math.nan


def judged(scores: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the AUC by generator and overall."""
    scores, truth = ({**each, "all": torch.cat(list(each.values()))} for each in (scores, truth))
    return {"auc": {n: round(auc(scores[n][truth[n]], scores[n][~truth[n]]), 3) for n in scores}}


def calibrated(scores: Mapping[str, Tensor], truth: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Return how well probabilities of right images are calibrated over all generators, and plot it."""
    score, right = (torch.cat(list(each.values())) for each in (scores, truth))
    bins = calibration(score, right)
    draw_reliability(bins, folder / "reliability.png")
    gap = sum(b["count"] * abs(b["mean"] - b["right"]) for b in bins) / len(score)
    accuracy = float(((score > 0.5) == right).float().mean())
    return {"calibration": bins, "ece": round(gap, 4), "accuracy": round(accuracy, 4)}


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
    """Return the accuracy of the held-out encoder's heads on new pictures."""
    model = averaged(args.output / "dinov2.pt", TowerTraining())
    rng = random.Random(99)
    images, scenes = new_pictures([sample_request(rng) for _ in range(args.report_pictures)], seed=99)
    shown, counts, where = tower_targets(scenes)
    parts = [model(part)[:3] for part in images.split(64)]
    patch, count, place = (torch.cat(each) for each in zip(*parts, strict=True))
    right = {"patch accuracy": patch.argmax(-1) == shown, "place accuracy": (place > 0) == (where > 0)}
    right["pictures with all counts right"] = (count.argmax(1) == counts).all(1)
    return {name: round(float(value.float().mean()), 4) for name, value in right.items()}
