"""Training of the reward: first on rendered images, then on generated ones optimized against it."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from noiseopt.shapes_world.captions import caption, parse, sample_request
from noiseopt.shapes_world.judge import judge, verdict

from .data import blemish, encode_pictures, failures, pictures
from .families import from_noise
from .gallery import gallery
from .models import Reward, decode, final_student, final_vae
from .negatives import wrong_request
from .optimization import Run, averaged
from .train_readers import Seen


def contrast(
    reward: Reward, texts: Tensor, images: Tensor, wrong: Tensor, bad: Tensor, same: Tensor
) -> dict[str, Tensor]:
    """Return contrastive losses over captions and images, and a binary loss for whether a pair fits.

    Args:
        reward: Provides the bias.
        texts, images: (B, 96), embeddings of B captions and their images.
        wrong: (B, K, 96), embeddings of K wrong captions of each image.
        bad: (B, 96), embeddings of a failed image of each caption.
        same: (B, B), true where a caption may be true of another image; such pairs are ignored.
    """
    grid = (20.0 * images @ texts.T).masked_fill(same, -1e4)
    own = grid.diagonal()
    hard = 20.0 * torch.einsum("bd,bkd->bk", images, wrong)
    failed = 20.0 * (texts * bad).sum(-1, keepdim=True)
    target = torch.arange(len(grid), device=grid.device)
    return {
        "caption": F.cross_entropy(torch.cat((grid, hard), 1), target),
        "picture": F.cross_entropy(torch.cat((grid.T, failed), 1), target),
        "fits": F.softplus(reward.bias - own).mean()
        + (F.softplus(hard - reward.bias).mean() + F.softplus(failed - reward.bias).mean()) / 2,
    }


def drawn_losses(reward: Reward, data: dict, failed: dict, batch: int, rng: random.Random) -> dict[str, Tensor]:
    """Return the losses of `contrast` for rendered images, with wrong captions and imitated failures."""
    bad_rows = (~failed["right"]).nonzero().squeeze(1)
    rows = bad_rows[torch.randint(0, len(bad_rows), (batch,))]
    requests = [parse(caption(data["scenes"][i], rng)) for i in rows.tolist()]
    wrong = [str(wrong_request(request, rng)) for request in requests for _ in range(3)]
    texts = reward.embed_texts([str(request) for request in requests] + wrong)
    images = torch.cat((data["images"][rows], failed["images"][rows])).to(reward.bias.device).float() / 255
    images, bad = reward.embed_images(blemish(images)).chunk(2)
    keys = [frozenset(request.objects) for request in requests]
    same = torch.tensor([[a == b for b in keys] for a in keys]).fill_diagonal_(False).to(reward.bias.device)
    return contrast(reward, texts[:batch], images, texts[batch:].unflatten(0, (-1, 3)), bad, same)


def train_clip(args: argparse.Namespace) -> None:
    """Train the reward on rendered images, against wrong captions and imitated failures of each."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    failed = failures(args.output / "failures.pt", data["scenes"][: args.failures], seed=2)
    run = Run(Reward().to(args.device), args.output / "clip.pt", samples=args.clip_samples, batch=64, lr=2e-3)
    rng = random.Random(3)
    for _ in run:
        run.step(drawn_losses(run.model, data, failed, run.batch, rng))


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


def explore(args: argparse.Namespace, reward: Reward, round_: int) -> dict:
    """Optimize the current reward on training prompts, and judge the images along the way."""
    student = final_student(args)
    vae, scale = final_vae(args), encode_pictures(args)["scale"]
    rng, generator = random.Random(1000 + round_), torch.Generator().manual_seed(1000 + round_)
    found: dict[str, list] = {"images": [], "prompts": [], "right": []}
    for _ in range(args.climbs // 32):
        prompts = [str(sample_request(rng)) for _ in range(8)] * 4
        noise = torch.randn(32, 8, 8, 8, generator=generator).to(args.device)
        with torch.no_grad():
            context = student.embed(prompts)
        climb = ascend(
            lambda z, context=context: decode(vae, from_noise(student, z, context), scale), reward, noise, prompts, 40
        )
        for step, (_, images, _) in enumerate(climb):
            if step in (0, 10, 20, 40):
                found["images"].append((images.cpu() * 255).round().byte())
                found["prompts"] += prompts
                found["right"] += [v.correct for v in judge(images, prompts)]
    right = torch.tensor(found["right"]).view(-1, 4, 32).float().mean((0, 2))
    print(f"round {round_}: right after 0, 10, 20, 40 steps {[round(r, 3) for r in right.tolist()]}", flush=True)
    return found | {"images": torch.cat(found["images"])}


def ranked(reward: Reward, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return losses that raise the scores of right images above those of wrong ones.

    They compare images of the same prompt ("pair") and of all prompts ("order"), and put right scores above and wrong
    ones below the bias of the reward ("side").

    Args:
        reward: Scores the images.
        images: (2 B, 3, 64, 64) in [0, 1]; the first half right, the second half wrong for the same prompts.
        prompts: B prompts.
    """
    texts = reward.embed_texts(prompts).repeat(2, 1)
    right, wrong = (20.0 * (reward.embed_images(images) * texts).sum(-1)).chunk(2)
    return {
        "pair": F.softplus(1.0 + wrong - right).mean(),
        "order": F.softplus(1.0 + wrong[None] - right[:, None]).mean(),
        "side": 0.25 * (F.softplus(reward.bias - right) + F.softplus(wrong - reward.bias)).mean(),
    }


def pairs(prompts: Sequence[str], right: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the rows of the right and of the wrong images of each prompt that has both."""
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    sides = [(rows[right[rows]], rows[~right[rows]]) for rows in map(torch.tensor, groups.values())]
    return [(yes, no) for yes, no in sides if len(yes) and len(no)]


def harden_clip(args: argparse.Namespace) -> None:
    """Train the reward in rounds on images by the student, including those optimized against the reward.

    Half of each batch are rendered images as before, to prevent forgetting.
    """
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    failed = failures(args.output / "failures.pt", data["scenes"][: args.failures], seed=2)
    reward = Reward().to(args.device)
    reward.load_state_dict(torch.load(args.output / "clip.pt")["average"])
    rng = random.Random(4)
    total = args.rounds * args.round_samples
    run = Run(reward, args.output / "hardened.pt", samples=total, batch=64, lr=1e-3, decay=0.99)
    for round_ in range(run.seen // args.round_samples, args.rounds):
        path = args.output / f"climbs_{round_}.pt"
        if not path.exists():
            torch.save(explore(args, run.average, round_), path)
        climbs = [torch.load(p) for p in sorted(args.output.glob("climbs_*.pt"))]
        images, right = torch.cat([c["images"] for c in climbs]), torch.cat([torch.tensor(c["right"]) for c in climbs])
        prompts = [prompt for c in climbs for prompt in c["prompts"]]
        sides, half = pairs(prompts, right), run.batch // 2
        if not sides:
            raise RuntimeError("Expected the student to be right for some noises of a prompt. Train the U-Net longer.")
        for _ in run:
            chosen = rng.choices(sides, k=half)
            rows = [rng.choice(yes.tolist()) for yes, _ in chosen] + [rng.choice(no.tolist()) for _, no in chosen]
            generated = blemish(images[rows].to(args.device).float() / 255)
            losses = ranked(run.model, generated, [prompts[i] for i in rows[:half]])
            run.step(losses | drawn_losses(run.model, data, failed, half, rng))
            if run.seen >= (round_ + 1) * args.round_samples:
                break
        run.save()


def refine_clip(args: argparse.Namespace) -> None:
    """Train the hardened reward on images of all generators, with many questions about each image."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    failed = failures(args.output / "failures.pt", data["scenes"][: args.failures], seed=2)
    drawn = [gallery(args), *(torch.load(path) for path in sorted(args.output.glob("climbs_*.pt")))]
    seen = Seen(torch.cat([d["images"] for d in drawn]), [prompt for d in drawn for prompt in d["prompts"]])
    right = [verdict(things, parse(p)).correct for things, p in zip(seen.things, seen.prompts, strict=True)]
    sides = pairs(seen.prompts, torch.tensor(right))
    reward = averaged(args.output / "hardened.pt", Reward()).requires_grad_()
    reward.clip.logit_scale.requires_grad_(False)
    run = Run(reward.to(args.device), args.output / "refined.pt", args.refine_samples, batch=96, lr=1.5e-3)
    rng, third = random.Random(torch.initial_seed()), run.batch // 3
    for _ in run:
        chosen = rng.choices(sides, k=third)
        rows = [rng.choice(yes.tolist()) for yes, _ in chosen] + [rng.choice(no.tolist()) for _, no in chosen]
        images = blemish(seen.images[rows].to(args.device).float() / 255)
        losses = ranked(run.model, images, [seen.prompts[i] for i in rows[:third]])
        run.step(
            losses | answered(run.model, images, seen, rows, rng) | drawn_losses(run.model, data, failed, third, rng)
        )


def answered(reward: Reward, images: Tensor, seen: Seen, rows: Sequence[int], rng: random.Random) -> dict[str, Tensor]:
    """Return the loss of a classifier: does an image show exactly what a request asks for?

    The answer is yes if its score is above the bias of the reward. Each image is asked about four requests.
    """
    asked = [[seen.question(row, rng) for _ in range(4)] for row in rows]
    correct = [[verdict(seen.things[row], r).correct for r in each] for row, each in zip(rows, asked, strict=True)]
    texts = reward.embed_texts([str(request) for each in asked for request in each]).unflatten(0, (-1, 4))
    logits = 20.0 * torch.einsum("bd,bkd->bk", reward.embed_images(images), texts) - reward.bias
    target = torch.tensor(correct, dtype=logits.dtype, device=logits.device)
    return {"answer": F.binary_cross_entropy_with_logits(logits, target)}
