"""Trains every model of the shapes world from scratch, with one command:

    python -m noiseopt.shapes_world.train --device cpu --output DIR
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .captions import sample_scene
from .world import SIZE, coverage, render


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for weight matrices, Adam for everything else.

    https://kellerjordan.github.io/posts/muon, with the update scaled to Adam's size as in https://arxiv.org/abs/2502.16982,
    so that one learning rate serves both. On these models it needs about half of Adam's samples.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"] * (p.ndim > 1))
                matrix = p.ndim > 1 and min(p.shape[0], p[0].numel()) > 8
                p.sub_(group["lr"] * (self._orthogonal(p) if matrix else self._adam(p)))

    def _orthogonal(self, p: nn.Parameter) -> Tensor:
        momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
        momentum.lerp_(p.grad, 0.05)
        update = p.grad.lerp(momentum, 0.95).flatten(1)
        wide = update if update.shape[0] <= update.shape[1] else update.T
        x = wide / (wide.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        x = x if update.shape[0] <= update.shape[1] else x.T
        return 0.2 * math.sqrt(max(x.shape)) * x.view_as(p)

    def _adam(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        first, second = (state.setdefault(key, torch.zeros_like(p)) for key in ("first", "second"))
        state["steps"] = state.get("steps", 0) + 1
        first.lerp_(p.grad, 0.1)
        second.lerp_(p.grad.square(), 0.01)
        return first / (1 - 0.9 ** state["steps"]) / ((second / (1 - 0.99 ** state["steps"])).sqrt() + 1e-8)


class Run:
    """The optimiser, the moving average, the schedule and the checkpoints of one stage."""

    def __init__(self, model: nn.Module, path: Path, samples: int, batch: int, lr: float, decay: float = 0.998) -> None:
        self.model, self.path, self.samples, self.batch, self.lr, self.decay = model, path, samples, batch, lr, decay
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizer = Muon([p for p in model.parameters() if p.requires_grad], lr)
        self.seen, self.started = 0, time.time()
        self.sums: dict[str, float] = {}
        if path.exists():
            self.load()

    def __iter__(self) -> Iterator[int]:
        """Yields the number of samples seen until the stage is done, saving as it goes."""
        steps = 0
        while self.seen < self.samples:
            yield self.seen
            steps += 1
            if steps % 200 == 0:
                self.save()
        self.save()

    def step(self, losses: dict[str, Tensor]) -> None:
        """One update by the sum of the losses; warm-up of 100 steps, then cosine to 2%."""
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1.0, (self.seen / self.batch + 1) / 100)
        cosine = 0.51 + 0.49 * math.cos(math.pi * min(1.0, self.seen / self.samples))
        self.optimizer.param_groups[0]["lr"] = self.lr * warm * cosine
        self.optimizer.step()
        self.seen += self.batch
        decay = min(self.decay, (self.seen / self.batch + 1) / (self.seen / self.batch + 20))
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.model.parameters()):
                slow.lerp_(fast, 1 - decay)
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(loss.detach())
        if (self.seen // self.batch) % 100 == 0:
            means = "  ".join(f"{name} {total / 100:.4f}" for name, total in self.sums.items())
            print(f"{self.path.stem} {self.seen:>8d}  {means}  {time.time() - self.started:.0f} s", flush=True)
            self.sums = {}

    def save(self) -> None:
        """Writes everything needed to continue."""
        state = {"model": self.model.state_dict(), "average": self.average.state_dict(), "seen": self.seen}
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def load(self) -> None:
        """Continues from the last checkpoint."""
        state = torch.load(self.path)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seen = state["seen"]


def pictures(path: Path, count: int, seed: int) -> dict:
    """Scenes with their pictures (N, 3, 64, 64) and foreground masks (N, 1, 64, 64) as uint8; drawn once, then read."""
    if not path.exists():
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        scenes = [sample_scene(rng) for _ in range(count)]
        images, masks = [], []
        for i in range(0, count, 500):
            images.append((render(scenes[i : i + 500], generator) * 255).round().byte())
            masks.append((coverage(scenes[i : i + 500]).amax(1, keepdim=True) * 255).byte())
        torch.save({"scenes": scenes, "images": torch.cat(images), "masks": torch.cat(masks)}, path)
    return torch.load(path, weights_only=False)


def new_vae() -> nn.Module:
    """An untrained autoencoder: 64x64 pixels to 8x8 latents of 8 channels."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(0, 0, 2, 3),
        num_decoder_blocks=(3, 2, 1, 0),
        scaling_factor=1.0,
    )


def crops(images: Tensor, masks: Tensor, size: int) -> Tensor:
    """Random size x size windows, 4 of 5 of them centred near a shape."""
    count = len(images)
    anywhere = torch.randint(0, SIZE - size + 1, (count, 2))
    spot = torch.multinomial(masks.flatten(1).float() + 1e-6, 1).squeeze(1)
    near = torch.stack((spot // SIZE, spot % SIZE), 1) - size // 2 + torch.randint(-8, 9, (count, 2))
    corner = torch.where(torch.rand(count, 1) < 0.8, near.clamp(0, SIZE - size), anywhere)
    span = torch.arange(size)
    rows, columns = corner[:, :1] + span, corner[:, 1:] + span
    return images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def vae_losses(output: Tensor, image: Tensor, z: Tensor) -> dict[str, Tensor]:
    """L1 that counts saturated pixels three times, L1 of the gradients, and a pull of the latents into the tanh range."""
    weight = 1 + 2 * ((image.amax(1, keepdim=True) - image.amin(1, keepdim=True)) > 0.5)
    gradient = sum(((output - image).diff(dim=dim) * weight.narrow(dim, 1, image.shape[dim] - 1)).abs().mean() for dim in (2, 3))
    size = 0.1 * (F.relu(z.abs() - 2.5).square() + 0.005 * z.square()).mean()
    return {"pixel": ((output - image).abs() * weight).mean(), "gradient": 0.5 * gradient, "size": size}


def train_vae(args: argparse.Namespace) -> None:
    """Trains the autoencoder on 32x32 windows around shapes: it is convolutional, and nothing else is as dear."""
    data = pictures(args.output / "pictures.pt", 40_000, seed=1)
    vae = new_vae().to(args.device)
    run = Run(vae, args.output / "vae.pt", samples=args.vae_samples, batch=64, lr=2e-3)
    forward = torch.compile(lambda x, noise: _autoencode(vae, x, noise)) if args.compile else None
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        images = crops(data["images"][rows], data["masks"][rows], 32)
        images = images.to(args.device).float() / 127.5 - 1
        noise = 0.05 * torch.randn(run.batch, 8, 4, 4, device=args.device)
        output, z = (forward or (lambda x, n: _autoencode(vae, x, n)))(images.contiguous(), noise)
        run.step(vae_losses(output, images, z))


def _autoencode(vae: nn.Module, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    z = vae.encoder(images)
    return vae.decoder(z + noise), z


STAGES = {"vae": train_vae}


def main() -> None:
    """Reads the command line and runs the stages."""
    parser = argparse.ArgumentParser(description="Trains the models of the shapes world.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--vae-samples", type=int, default=200_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
