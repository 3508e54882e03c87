"""Training of the image encoder for held-out features, and of the vision-language model."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noiseopt.shapes_world.captions import OBJECTS, Request, parse
from noiseopt.shapes_world.judge import Thing, describe, see, verdict
from noiseopt.shapes_world.world import LAYOUT, OPPOSITE, SIDE, SIZE, Scene, coverage

from .data import blemish, failures, pictures
from .gallery import gallery
from .negatives import wrong_request
from .optimization import Run
from .readers import HOLDS, PATCH, SHOWS, Questions, TowerTraining, new_question_tokenizer, new_vlm


def tower_targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the targets for image patches and for whole images.

    They are the index of the object in each patch (B, 64), `len(OBJECTS)` if there is none; the count of each object in
    the image (B, 30); and whether a patch has an object (B, 64).
    """
    cover = F.avg_pool2d(coverage(scenes), PATCH).flatten(2)
    names = [[OBJECTS.index((s.color, s.kind)) for s in scene.shapes] for scene in scenes]
    slots = torch.tensor([row + [0] * (3 - len(row)) for row in names])
    most, which = cover.max(1)
    shown = torch.where(most > 0.25, slots.gather(1, which), len(OBJECTS))
    counts = torch.stack([torch.bincount(torch.tensor(row), minlength=len(OBJECTS)) for row in names])
    return shown, counts, (most > 0.25).float()


def train_tower(args: argparse.Namespace) -> None:
    """Train the image encoder to read rendered images without text, for features that no method optimizes."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    run = Run(TowerTraining().to(args.device), args.output / "dinov2.pt", args.tower_samples, batch=64, lr=2e-3)
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        shown, counts, where = (t.to(args.device) for t in tower_targets([data["scenes"][i] for i in rows.tolist()]))
        images = blemish(data["images"][rows].to(args.device).float() / 255)
        patch, count, place, ground, _ = run.model(images)
        looks = data["chance"][rows, LAYOUT:].to(args.device)
        run.step(
            {
                "patch": F.cross_entropy(patch.flatten(0, 1), shown.flatten()),
                "count": 3 * F.cross_entropy(count, counts),
                "where": F.binary_cross_entropy_with_logits(place, where),
                "ground": 3 * F.mse_loss(ground, looks),
            }
        )


class Seen:
    """Training images, mirrored ones included, with the objects that they show, so that each question has an answer."""

    def __init__(self, images: Tensor, prompts: Sequence[str]) -> None:
        self.images = torch.cat((images, images.flip(-1)))
        self.prompts = [*prompts, *map(mirrored_prompt, prompts)]
        things = [found for part in images.split(256) for found in see(part.float() / 255)]
        self.things = things + [[replace(thing, x=SIDE - thing.x) for thing in found] for found in things]

    def question(self, row: int, rng: random.Random) -> Request:
        """Return a request that an image fulfills or nearly does: its prompt or its content, possibly changed."""
        request = parse(self.prompts[row])
        if rng.random() < 0.4:
            request = seen_request(self.things[row]) or request
        return request if rng.random() < 0.4 else wrong_request(request, rng)

    def ask(self, row: int, rng: random.Random, own: float = 0.5) -> tuple[str, int]:
        """Return a question and its answer, 0 or 1: does the image show exactly a request, or contain it?

        A share `own` of the questions is about the image's own prompt, as in later use.
        """
        asks_own = rng.random() < own
        request = parse(self.prompts[row]) if asks_own else self.question(row, rng)
        answer = verdict(self.things[row], request)
        if asks_own or rng.random() < 0.6:
            return SHOWS.format(request), int(answer.correct)
        return HOLDS.format(request), int(answer.lenient)


def mirrored_prompt(prompt: str) -> str:
    """Return the prompt of the mirror image."""
    request = parse(prompt)
    sideways = request.relation in ("left of", "right of")
    return str(Request(request.objects, OPPOSITE[str(request.relation)]) if sideways else request)


def seen_request(things: Sequence[Thing]) -> Request | None:
    """Return the content of an image as a request, if it is one."""
    try:
        return parse(describe(things))
    except ValueError:
        return None


class VLMTraining(nn.Module):
    """The vision-language model with packed questions."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.tokenizer = new_question_tokenizer()
        self.vlm = new_vlm(self.tokenizer, size)
        self.questions = Questions(self.tokenizer)

    def forward(self, images: Tensor, asked: Sequence[Sequence[tuple[str, int]]]) -> Tensor:
        """Return the cross entropy of answer and end token for B times K questions on (B, 3, 64, 64)."""
        logits = self.questions(self.vlm, images, asked)
        return F.cross_entropy(logits.flatten(0, 2), self.questions.targets(asked).flatten().to(images.device))


def train_vqa(args: argparse.Namespace) -> None:
    """Train the vision-language model on rendered images, imitated failures and generated images.

    The last 6% mostly asks about the own prompts of generated images, as in later use, for calibration.
    """
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    failed = failures(args.output / "failures.pt", data["scenes"][: args.failures], seed=2)
    drawn = gallery(args)
    texts = [str(request) for request in data["requests"]]
    sources = [
        Seen(data["images"][: args.failures], texts[: args.failures]),
        Seen(failed["images"], texts[: len(failed["images"])]),
        Seen(drawn["images"], drawn["prompts"]),
    ]
    run = Run(VLMTraining().to(args.device), args.output / "vqa.pt", args.vqa_samples, batch=48, lr=2e-3)
    rng = random.Random(torch.initial_seed())
    for _ in run:
        last = run.seen >= 0.94 * run.samples
        weights, own, count = ((0, 0, 1), 0.9, 1) if last else ((1, 1, 3), 0.5, 5)
        chosen = [(s, rng.randrange(len(s.images))) for s in rng.choices(sources, weights, k=run.batch)]
        asked = [[s.ask(row, rng, own) for _ in range(count)] for s, row in chosen]
        images = blemish(torch.stack([s.images[row] for s, row in chosen]).to(args.device).float() / 255)
        run.step({"answer": 2 * run.model(images, asked)})
