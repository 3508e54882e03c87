"""Refinement of the reward in rounds, on images of the generators and on those optimized against it."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noiseopt.shapes_world.captions import parse, sample_request
from noiseopt.shapes_world.judge import judge, verdict

from .autoencoder import final_vae
from .data import blemish, failures, pictures
from .drawing import drawn
from .generators import SIDE, SDGenerator
from .optimization import Run, averaged
from .questions import Seen
from .readers import Reward
from .reward_losses import answered, drawn_losses, ranked

STEPS = (0, 10, 20, 40)  # of the ascents, whose images are kept


def explore(args: argparse.Namespace, reward: Reward, round_: int) -> dict[str, Any]:
    """Optimize the reward of the one-step student's images on training prompts: images (uint8) and prompts."""
    student, vae = averaged(args.output / "turbo.pt", SDGenerator()).to(args.device), final_vae(args)
    rng, generator = random.Random(1000 + round_), torch.Generator().manual_seed(1000 + round_)
    images, asked, right = [], [], []
    for _ in range(args.climbs // 32):
        prompts = [str(sample_request(rng)) for _ in range(8)] * 4
        noise = torch.randn(32, 4, SIDE, SIDE, generator=generator).to(args.device)
        with torch.no_grad():
            context = student.embed(prompts)

        def draw(z: torch.Tensor, context: torch.Tensor = context) -> torch.Tensor:
            v = student.predict(z, torch.full((len(z),), 999.0, device=z.device), context)
            level = student.scheduler.alphas_cumprod[-1]
            latents = level.sqrt() * z - (1 - level).sqrt() * v
            return (vae.decoder(latents) / 2 + 0.5).clamp(0.0, 1.0)

        for step, (_, each, _) in enumerate(ascend(draw, reward, noise, prompts, STEPS[-1], rate=14.0)):
            if step in STEPS:
                images.append((each.cpu() * 255).round().byte())
                asked += prompts
                right += [v.correct for v in judge(each, prompts)]
    shares = torch.tensor(right).view(-1, len(STEPS), 32).float().mean((0, 2))
    print(f"round {round_}: right after {STEPS} steps {[round(r, 3) for r in shares.tolist()]}", flush=True)
    return {"images": torch.cat(images), "prompts": asked}


def refine_clip(args: argparse.Namespace) -> None:
    """Train the reward to rank images of the generators, and those of ascents against it, by whether they are right."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    failed = failures(args.output / "failures.pt", data["scenes"][: args.failures], seed=2)
    reward = averaged(args.output / "clip.pt", Reward(args.dtype)).requires_grad_()
    reward.clip.logit_scale.requires_grad_(False)
    run = Run(reward.to(args.device), args.output / "refined.pt", args.refined_samples, batch=96, lr=1.5e-3)
    rng, third, per_round = random.Random(torch.initial_seed()), run.batch // 3, args.refined_samples // args.rounds
    for round_ in range(run.seen // per_round, args.rounds):
        path = args.output / f"climbs_{round_}.pt"
        if not path.exists():
            torch.save(explore(args, run.average, round_), path)
        seen, sides = generated(args.output)
        for _ in run:
            chosen = rng.choices(sides, k=third)
            rows = [rng.choice(yes.tolist()) for yes, _ in chosen] + [rng.choice(no.tolist()) for _, no in chosen]
            images = blemish(seen.images[rows].to(args.device).float() / 255)
            losses = ranked(run.model, images, [seen.prompts[i] for i in rows[:third]])
            losses |= answered(run.model, images, seen, rows, rng)
            run.step(losses | drawn_losses(run.model, data, failed, third, rng))
            if run.seen >= (round_ + 1) * per_round:
                break
        run.save()


def generated(folder: Path) -> tuple[Seen, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return all images of generators, and the rows of right and wrong ones of each prompt that has both."""
    parts = [drawn(folder, pattern) for pattern in ("gallery_*.pt", "climbs_*.pt")]
    seen = Seen(torch.cat([images for images, _ in parts]), [prompt for _, prompts in parts for prompt in prompts])
    right = [verdict(things, parse(p)).correct for things, p in zip(seen.things, seen.prompts, strict=True)]
    sides = pairs(seen.prompts, torch.tensor(right))
    if not sides:
        raise RuntimeError("Expected generators to be right for some noises of a prompt. Train them longer.")
    return seen, sides


def pairs(prompts: Sequence[str], right: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the rows of the right and of the wrong images of each prompt that has both."""
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    sides = [(rows[right[rows]], rows[~right[rows]]) for rows in map(torch.tensor, groups.values())]
    return [(yes, no) for yes, no in sides if len(yes) and len(no)]


def ascend(
    draw: Callable[[Tensor], Tensor],
    reward: Reward,
    noise: Tensor,
    prompts: Sequence[str],
    steps: int,
    rate: float = 5.0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ascend the gradient of the reward as in ReNO, https://arxiv.org/abs/2406.04312, with the norm of the noise fixed.

    Yields noise, images and scores before each step and after the last. `draw` maps a noise to images in [0, 1].
    """
    with torch.no_grad():
        texts = reward.embed_texts(prompts)
    noise, velocity = noise.clone(), torch.zeros_like(noise)
    for step in range(steps + 1):
        noise.requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            images = draw(noise)
            scores = 20.0 * (reward.embed_images(images) * texts).sum(-1)
        yield noise.detach(), images.detach(), scores.detach()
        if step == steps:
            return
        (gradient,) = torch.autograd.grad(scores.sum(), noise)
        gradient = gradient * (0.1 / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=0.1))
        velocity = 0.9 * velocity + gradient
        noise = noise.detach() + rate * (gradient + 0.9 * velocity)
        noise = noise * (math.sqrt(noise[0].numel()) / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
