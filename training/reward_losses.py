"""Losses of the reward."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from noiseopt.shapes_world.captions import caption, parse
from noiseopt.shapes_world.judge import verdict

from .data import blemish
from .negatives import wrong_request
from .questions import Seen
from .readers import Reward


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


def ranked(reward: Reward, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return losses that raise the scores of right images above those of wrong ones.

    They compare images of the same prompt ("pair") and of all prompts ("order"), and put right scores above and wrong
    ones below the bias of the reward ("side").

    Args:
        reward: Scores the images.
        images: (2 B, 3, 128, 128) in [0, 1]; the first half right, the second half wrong for the same prompts.
        prompts: B prompts.
    """
    texts = reward.embed_texts(prompts).repeat(2, 1)
    right, wrong = (20.0 * (reward.embed_images(images) * texts).sum(-1)).chunk(2)
    return {
        "pair": F.softplus(1.0 + wrong - right).mean(),
        "order": F.softplus(1.0 + wrong[None] - right[:, None]).mean(),
        "side": 0.25 * (F.softplus(reward.bias - right) + F.softplus(wrong - reward.bias)).mean(),
    }


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
