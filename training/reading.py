"""Training of the readers of pictures: the reward, the vision-language model, and the encoder for held-out features.

Reward and vision-language model begin with the same image encoder, which has learned to say what is in each patch. The
held-out encoder shares nothing with them; its class token tells whether two pictures are copies of one another, as the
features of https://arxiv.org/abs/2202.10261 do, with which the similarity of sets is usually measured.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noiseopt.shapes_world.captions import OBJECTS, sample_request
from noiseopt.shapes_world.world import LOOKS, SIZE, render

from .data import blemish, failures, pictures, sample_pictures
from .drawing import drawn
from .optimization import Run, averaged
from .precision import half
from .questions import Seen
from .readers import Reward, TowerTraining, VLMTraining, tower_targets
from .reward_losses import drawn_losses


def new_eyes() -> Any:
    """Build the untrained image encoder of reward and vision-language model."""
    return VLMTraining().vlm.model.vision_tower


class EyesTraining(nn.Module):
    """The image encoder with training heads: content of each patch, count of each object, ground."""

    def __init__(self) -> None:
        super().__init__()
        self.eyes = new_eyes()
        width = self.eyes.config.hidden_size
        self.patch = nn.Linear(width, len(OBJECTS) + 1)
        self.count = nn.Linear(width, 4 * len(OBJECTS))
        self.ground = nn.Linear(width, LOOKS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images (B, 3, 128, 128) in [0, 1] to logits (B, 64, 31), (B, 4, 30) and looks (B, 12)."""
        tokens = self.eyes(pixel_values=images * 2 - 1).last_hidden_state
        whole, patches = tokens[:, 0], tokens[:, 1:]
        return self.patch(patches), self.count(whole).unflatten(1, (4, -1)), self.ground(whole)


def train_eyes(args: argparse.Namespace) -> None:
    """Train the image encoder of the other readers on rendered pictures."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    run = Run(EyesTraining().to(args.device), args.output / "eyes.pt", args.eyes_samples, batch=64, lr=2e-3)
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        shown, counts, _ = (t.to(args.device) for t in tower_targets([data["scenes"][i] for i in rows.tolist()]))
        with half(args.device, args.dtype):
            patch, count, ground = run.model(blemish(data["images"][rows].to(args.device).float() / 255))
        run.step(
            {
                "patch": F.cross_entropy(patch.float().flatten(0, 1), shown.flatten()),
                "count": 3 * F.cross_entropy(count.float(), counts),
                "ground": 3 * F.mse_loss(ground.float(), data["looks"][rows].to(args.device)),
            }
        )


def train_clip(args: argparse.Namespace) -> None:
    """Train the reward on rendered pictures, against wrong captions and imitated failures of each."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    failed = failures(args.output / "failures.pt", data["scenes"][: args.failures], seed=2)
    reward = Reward(args.dtype)
    reward.clip.vision_model.load_state_dict(averaged(args.output / "eyes.pt", EyesTraining()).eyes.state_dict())
    run = Run(reward.to(args.device), args.output / "clip.pt", args.clip_samples, batch=64, lr=2e-3)
    rng = random.Random(3)
    for _ in run:
        run.step(drawn_losses(run.model, data, failed, run.batch, rng))


def copies(features: Tensor, same: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the supervised contrastive loss, https://arxiv.org/abs/2004.11362, of B pictures.

    Args:
        features: (B, D), the features.
        same: (B, B), which are copies of one another; each of itself and of at least one other.
        temperature: Scale of the differences of cosines.
    """
    unit = F.normalize(features, dim=1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    chances = (unit @ unit.T / temperature).masked_fill(itself, -1e4).log_softmax(1)
    other = (same & ~itself).float()
    return -((chances * other).sum(1) / other.sum(1)).mean()


def copy_labels(requests: Sequence[Any], usual: Tensor) -> Tensor:
    """Return which pictures are copies, (N, N): itself, and others of its request if both are usual in all, (N, 2)."""
    twins = torch.tensor([[a == b for b in requests] for a in requests])
    plain = usual.all(1)
    return (twins & plain[:, None] & plain) | torch.eye(len(twins), dtype=torch.bool)


def train_tower(args: argparse.Namespace) -> None:
    """Train the held-out encoder on two views of each of eight pictures of each of four requests, without text.

    So most pictures that are to be told apart show the same things.
    """
    run = Run(TowerTraining().to(args.device), args.output / "dinov2.pt", args.tower_samples, batch=64, lr=2e-3)
    rng, generator = random.Random(torch.initial_seed()), torch.Generator().manual_seed(torch.initial_seed())
    for _ in run:
        requests = [sample_request(rng) for _ in range(run.batch // 16)] * 8
        scenes, looks, usual = sample_pictures(requests, rng)
        images = render(scenes, generator, looks, SIZE).to(args.device)
        shown, counts, where = (t.to(args.device) for t in tower_targets(scenes + scenes))
        with half(args.device, args.dtype):
            views = torch.cat((blemish(images), blemish(images)))
            patch, count, place, ground, whole = run.model(views)
        same = copy_labels(requests, usual).repeat(2, 2).to(args.device)
        run.step(
            {
                "patch": F.cross_entropy(patch.float().flatten(0, 1), shown.flatten()),
                "count": 3 * F.cross_entropy(count.float(), counts),
                "where": F.binary_cross_entropy_with_logits(place.float(), where),
                "ground": 3 * F.mse_loss(ground.float(), looks.repeat(2, 1).to(args.device)),
                "copies": 2 * copies(whole.float(), same),
            }
        )


def all_seen(args: argparse.Namespace) -> list[Seen]:
    """Return pictures, imitated failures and, once there are some, images of the generators, to ask about."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    failed = failures(args.output / "failures.pt", data["scenes"][: args.failures], seed=2)
    texts = [str(request) for request in data["requests"]]
    sources = [Seen(data["images"][: args.failures], texts[: args.failures])]
    sources.append(Seen(failed["images"], texts[: len(failed["images"])]))
    images, prompts = drawn(args.output)
    if prompts:
        sources.append(Seen(images, prompts))
    return sources


def train_vqa(args: argparse.Namespace) -> None:
    """Train the vision-language model on many questions about rendered and generated pictures."""
    sources = all_seen(args)
    model = VLMTraining()
    eyes = averaged(args.output / "eyes.pt", EyesTraining()).eyes
    model.vlm.model.vision_tower.load_state_dict(eyes.state_dict())
    run = Run(model.to(args.device), args.output / "vqa.pt", args.vqa_samples, batch=48, lr=2e-3)
    rng, weights = random.Random(torch.initial_seed()), (1, 1, 3)[: len(sources)]
    for _ in run:
        chosen = [(s, rng.randrange(len(s.images))) for s in rng.choices(sources, weights, k=run.batch)]
        asked = [[s.ask(row, rng) for _ in range(5)] for s, row in chosen]
        images = blemish(torch.stack([s.images[row] for s, row in chosen]).to(args.device).float() / 255)
        with half(args.device, args.dtype):
            losses = run.model(images, asked, [s.things[row] for s, row in chosen])
        run.step(losses)
