"""Trains every model of the shapes world from scratch, with one command:

python -m noiseopt.shapes_world.train --device cpu --output DIR
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .captions import CATEGORIES, VALIDATION_PROMPTS, caption, category, parse, sample_request
from .coupling import couple
from .judge import judge
from .negatives import imitate_failure, wrong_request
from .text import MAX_LENGTH, new_tokenizer
from .world import LAYOUT, LOOKS, SIZE, Scene, coverage, lay_out, render

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


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
        for _ in range(3):
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
        torch.manual_seed(self.seen + (dist.get_rank() if dist.is_initialized() else 0))

    def __iter__(self) -> Iterator[int]:
        """Yields the number of samples seen until the stage is done, saving as it goes."""
        steps = 0
        while self.seen < self.samples:
            yield self.seen
            steps += 1
            if steps % 100 == 0:
                self.save()
        self.save()

    def step(self, losses: dict[str, Tensor]) -> None:
        """One update by the sum of the losses; warm-up of 100 steps, then cosine to 2%."""
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1.0, (self.seen / self.batch + 1) / 100)
        cosine = 0.51 + 0.49 * math.cos(math.pi * min(1.0, self.seen / self.samples))
        self.optimizer.param_groups[0]["lr"] = self.lr * warm * cosine
        self.optimizer.step()
        self.seen += self.batch
        decay = min(self.decay, (self.seen / self.batch + 1) / (self.seen / self.batch + 20))
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(loss.detach())
        if (self.seen // self.batch) % 100 == 0 and not (dist.is_initialized() and dist.get_rank()):
            means = "  ".join(f"{name} {total / 100:.4f}" for name, total in self.sums.items())
            print(f"{self.path.stem} {self.seen:>8d}  {means}  {time.time() - self.started:.0f} s", flush=True)
            self.sums = {}

    def _share_gradients(self) -> None:
        if not dist.is_initialized():
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def save(self) -> None:
        """Writes everything needed to continue."""
        if dist.is_initialized() and dist.get_rank() > 0:
            return
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
    """Requests, scenes, their chances, pictures (N, 3, 64, 64) and masks of the shapes (N, 1, 64, 64), both uint8."""
    if not path.exists():
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        requests = [sample_request(rng) for _ in range(count)]
        chance = torch.rand(count, LAYOUT + LOOKS, generator=generator)
        layouts, looks = chance[:, :LAYOUT].tolist(), chance[:, LAYOUT:]
        scenes = [lay_out(r.objects, layout, r.relation) for r, layout in zip(requests, layouts, strict=True)]
        images, masks = [], []
        for i in range(0, count, 500):
            images.append((render(scenes[i : i + 500], generator, looks[i : i + 500]) * 255).round().byte())
            masks.append((coverage(scenes[i : i + 500]).amax(1, keepdim=True) * 255).byte())
        data = {"requests": requests, "scenes": scenes, "chance": chance}
        torch.save(data | {"images": torch.cat(images), "masks": torch.cat(masks)}, path)
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


def vae_losses(output: Tensor, image: Tensor) -> dict[str, Tensor]:
    """L1 that counts saturated pixels three times, and L1 of the gradients."""
    weight = 1 + 2 * ((image.amax(1, keepdim=True) - image.amin(1, keepdim=True)) > 0.5)
    error = output - image
    gradient = sum((error.diff(dim=d) * weight.narrow(d, 1, image.shape[d] - 1)).abs().mean() for d in (2, 3))
    return {"pixel": (error.abs() * weight).mean(), "gradient": 0.5 * gradient}


def train_vae(args: argparse.Namespace) -> None:
    """Trains the autoencoder on 32x32 windows around shapes: it is convolutional, and nothing else is as dear."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    vae = new_vae().to(args.device)
    run = Run(vae, args.output / "vae.pt", samples=args.vae_samples, batch=64, lr=2e-3)
    forward = torch.compile(lambda x, noise: _autoencode(vae, x, noise)) if args.compile else None
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        images = crops(data["images"][rows], data["masks"][rows], 32)
        images = images.to(args.device).float() / 127.5 - 1
        noise = 0.05 * torch.randn(run.batch, 8, 4, 4, device=args.device)
        output, z = (forward or (lambda x, n: _autoencode(vae, x, n)))(images.contiguous(), noise)
        inside_tanh = 0.1 * (F.relu(z.abs() - 2.5).square() + 0.005 * z.square()).mean()
        run.step(vae_losses(output, images) | {"size": inside_tanh})


def _autoencode(vae: nn.Module, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    z = vae.encoder(images)
    return vae.decoder(z + noise), z


def new_clip() -> nn.Module:
    """An untrained dual encoder with a fixed temperature: scores are 20 times the cosine."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = new_tokenizer()
    tower = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 96}
    config = CLIPConfig(
        text_config=tower | text_options(tokenizer),
        vision_config=tower | {"num_hidden_layers": 3, "image_size": SIZE, "patch_size": 8},
        projection_dim=96,
        logit_scale_init_value=math.log(20.0),
    )
    model = CLIPModel(config)
    model.logit_scale.requires_grad_(False)
    return model


def text_options(tokenizer: CLIPTokenizer) -> dict:
    """What the text towers of the reward and of the generators have in common."""
    return {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }


class Reward(nn.Module):
    """A CLIP model with a bias that says from which score on a picture is right; only the CLIP model ships."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = new_clip()
        self.bias = nn.Parameter(torch.tensor(10.0))
        self.tokenizer = new_tokenizer()

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [0, 1] -> (B, 96) of unit length."""
        pooled = self.clip.vision_model(pixel_values=images * 2 - 1).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, 96) of unit length."""
        tokens = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.bias.device)
        pooled = self.clip.text_model(input_ids=tokens.input_ids).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores of B pictures and their B prompts, (B,)."""
        return 20.0 * (self.embed_images(images) * self.embed_texts(prompts)).sum(-1)


def blemish(images: Tensor) -> Tensor:
    """Small shifts, blur, noise and brightness: what says nothing about right and wrong; (B, 3, 64, 64) in [0, 1]."""
    count = len(images)
    dx, dy = (int(v) for v in torch.randint(-3, 4, (2,)))
    images = F.pad(images, (3, 3, 3, 3), mode="replicate")[..., 3 + dy : 3 + dy + SIZE, 3 + dx : 3 + dx + SIZE]
    one = (count, 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    strength = (torch.rand(one) - 0.4).clamp(min=0.0) * 1.6
    images = images.lerp(blurred, strength.to(images))
    noise = (torch.rand(one) - 0.5).clamp(min=0.0).to(images) * 0.1
    gain = 1 + 0.08 * torch.randn(one).to(images)
    return (images * gain + noise * torch.randn_like(images)).clamp(0.0, 1.0)


def failures(path: Path, scenes: Sequence[Scene], seed: int) -> dict:
    """Imitated failures of the scenes, uint8 (N, 3, 64, 64), and whether they are right all the same, (N,)."""
    if not path.exists():
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        images, right = [], []
        for i in range(0, len(scenes), 500):
            part = scenes[i : i + 500]
            drawn = render([imitate_failure(scene, rng) for scene in part], generator)
            right += [v.correct for v in judge(drawn, [caption(scene) for scene in part])]
            images.append((drawn * 255).round().byte())
        torch.save({"images": torch.cat(images), "right": torch.tensor(right)}, path)
    return torch.load(path)


def contrast(
    reward: Reward, texts: Tensor, images: Tensor, wrong: Tensor, bad: Tensor, same: Tensor
) -> dict[str, Tensor]:
    """Which caption, which picture, and whether a pair fits at all.

    Args:
        reward: Gives the bias.
        texts, images: (B, 96), embeddings of B captions and their pictures.
        wrong: (B, K, 96), embeddings of K wrong captions of each picture.
        bad: (B, 96), embeddings of a failed picture of each caption.
        same: (B, B), true where a caption may be true of another picture, which then does not count.
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
    """`contrast` of drawn pictures with wrong captions and imitated failures."""
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
    """Trains the reward on drawn pictures, against wrong captions and imitated failures of each."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    failed = failures(args.output / "failures.pt", data["scenes"][: args.failures], seed=2)
    run = Run(Reward().to(args.device), args.output / "clip.pt", samples=args.clip_samples, batch=64, lr=2e-3)
    rng = random.Random(3)
    for _ in run:
        run.step(drawn_losses(run.model, data, failed, run.batch, rng))


def averaged(path: Path, model: nn.Module) -> nn.Module:
    """Loads the moving average of a stage's weights."""
    model.load_state_dict(torch.load(path)["average"])
    return model.requires_grad_(False).eval()


def encode_pictures(args: argparse.Namespace) -> dict:
    """Requests and chances with the scaled latents (N, 8, 8, 8) and masks (N, 1, 8, 8) of their pictures."""
    path = args.output / "latents.pt"
    if not path.exists():
        data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
        vae = averaged(args.output / "vae.pt", new_vae()).to(args.device)
        with torch.no_grad():
            images = (part.to(args.device).float() / 127.5 - 1 for part in data["images"].split(250))
            latents = torch.cat([vae.encoder(part).cpu() for part in images])
        masks = torch.cat([F.max_pool2d(part.float() / 255, 8) for part in data["masks"].split(1000)])
        scale = float(1 / latents.std())
        kept = {key: data[key] for key in ("requests", "chance")}
        torch.save(kept | {"latents": latents * scale, "masks": masks, "scale": scale}, path)
    return torch.load(path, weights_only=False)


class Generator(nn.Module):
    """The U-Net and its text encoder, trained together; predicts v."""

    def __init__(self) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        self.tokenizer = new_tokenizer()
        tower = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 96}
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**tower, **text_options(self.tokenizer)))
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            layers_per_block=1,
            block_out_channels=(64, 96),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=96,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            clip_sample=False,
            steps_offset=1,
        )

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, 16, 96), as the stock pipeline does it."""
        tokens = self.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(self.unet.device)).last_hidden_state

    def forward(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """v of noisy latents (B, 8, 8, 8) at timesteps t, (B,) in [0, 999]."""
        return self.unet(noisy, t, self.embed(prompts)).sample

    @torch.no_grad()
    def sample(self, noise: Tensor, prompts: Sequence[str], steps: int, guidance: float) -> Tensor:
        """DDIM from unit noise (B, 8, 8, 8) to scaled latents."""
        context = self.embed([""] * len(prompts) * (guidance > 1) + list(prompts))
        self.scheduler.set_timesteps(steps)
        z = noise
        for t in self.scheduler.timesteps:
            v = self.unet(torch.cat([z] * (len(context) // len(z))), t, context).sample
            if guidance > 1:
                free, bound = v.chunk(2)
                v = free + guidance * (bound - free)
            z = self.scheduler.step(v, t, z).prev_sample
        return z


def coupled_losses(model: Generator, data: dict, batch: int, rng: random.Random, last: float) -> dict[str, Tensor]:
    """Error of v at random times and, for a share `last` of the batch, of x0 from pure noise at t = 999.

    Cells of the latent that show shapes count three times.
    """
    device = model.unet.device
    rows = torch.randint(0, len(data["latents"]), (batch,))
    prompts = [str(data["requests"][i]) if rng.random() > 0.08 else "" for i in rows.tolist()]
    z, weight = data["latents"][rows].to(device), 1 + 2 * data["masks"][rows].to(device)
    noise = couple(torch.randn_like(z), data["chance"][rows])
    t = (1000 * torch.sigmoid(0.3 + 1.3 * torch.randn(batch))).long().clamp(max=998).to(device)
    noisy, v = model.scheduler.add_noise(z, noise, t), model.scheduler.get_velocity(z, noise, t)
    count = round(last * batch)
    alpha = float(model.scheduler.alphas_cumprod[999])
    t[:count], noisy[:count] = 999, noise[:count]
    v[:count] = (math.sqrt(alpha) * noise[:count] - z[:count]) / math.sqrt(1 - alpha)
    error = (model(noisy, t, prompts) - v).square() * weight
    losses = {"last": error[:count].sum() / weight.sum() / 8}
    return losses | ({"v": error[count:].sum() / weight.sum() / 8} if count < batch else {})


def train_unet(args: argparse.Namespace) -> None:
    """Trains the guided teacher, 3 of 4 samples at t = 999."""
    data = encode_pictures(args)
    model = Generator().to(args.device)
    if (args.output / "clip.pt").exists():
        tower = averaged(args.output / "clip.pt", Reward()).clip.text_model
        model.text_encoder.load_state_dict(tower.state_dict())
    run = Run(model, args.output / "unet.pt", samples=args.unet_samples, batch=64, lr=2.5e-3, decay=0.998)
    batch = run.batch // (dist.get_world_size() if dist.is_initialized() else 1)
    rng = random.Random(torch.initial_seed() + run.seen)
    for _ in run:
        run.step(coupled_losses(run.model, data, batch, rng, last=0.75))


def decode(vae: nn.Module, latents: Tensor, scale: float) -> Tensor:
    """Scaled latents (B, 8, 8, 8) -> pictures (B, 3, 64, 64) in [0, 1]."""
    return (vae.decoder(latents / scale) / 2 + 0.5).clamp(0.0, 1.0)


def final_vae(args: argparse.Namespace) -> nn.Module:
    """The autoencoder with the decoder as far as it has been trained."""
    path = args.output / "decoder.pt"
    return averaged(path if path.exists() else args.output / "vae.pt", new_vae()).to(args.device)


def final_student(args: argparse.Namespace) -> Generator:
    """The one-step student, or the teacher it starts from."""
    path = args.output / "student.pt"
    return averaged(path if path.exists() else args.output / "unet.pt", Generator()).to(args.device)


def train_student(args: argparse.Namespace) -> None:
    """Trains the teacher further as a one-step student: only from pure noise at t = 999."""
    data = encode_pictures(args)
    model = Generator().to(args.device)
    model.load_state_dict(torch.load(args.output / "unet.pt")["average"])
    run = Run(model, args.output / "student.pt", samples=args.student_samples, batch=64, lr=1.5e-3, decay=0.998)
    batch = run.batch // (dist.get_world_size() if dist.is_initialized() else 1)
    rng = random.Random(torch.initial_seed() + run.seen)
    for _ in run:
        run.step(coupled_losses(run.model, data, batch, rng, last=1.0))


def one_step(student: Generator, noise: Tensor, context: Tensor) -> Tensor:
    """The student's latents, as the stock pipeline gets them in one step without guidance; noise (B, 8, 8, 8)."""
    alpha = float(student.scheduler.alphas_cumprod[999])
    v = student.unet(noise, torch.tensor(999, device=noise.device), context).sample
    return math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * v


def ascend(
    student: Generator, vae: nn.Module, scale: float, reward: Reward, noise: Tensor, prompts: Sequence[str], steps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Gradient ascent on the reward as in ReNO, https://arxiv.org/abs/2406.04312, with the noise kept at its length.

    Yields noise, pictures and scores before each step and after the last.
    """
    with torch.no_grad():
        context, texts = student.embed(prompts), reward.embed_texts(prompts)
    noise, velocity = noise.clone(), torch.zeros_like(noise)
    for step in range(steps + 1):
        noise.requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            images = decode(vae, one_step(student, noise, context), scale)
            scores = 20.0 * (reward.embed_images(images) * texts).sum(-1)
        yield noise.detach(), images.detach(), scores.detach()
        if step == steps:
            return
        (gradient,) = torch.autograd.grad(scores.sum(), noise)
        gradient = gradient * (0.1 / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=0.1))
        velocity = 0.9 * velocity + gradient
        noise = noise.detach() + 5.0 * (gradient + 0.9 * velocity)
        noise = noise * (math.sqrt(noise[0].numel()) / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def train_decoder(args: argparse.Namespace) -> None:
    """Trains the decoder further on whole pictures: from noisier latents and, half of the batch, from the student's.

    It learns to make clean shapes of what a U-Net draws.
    """
    data, latents = pictures(args.output / "pictures.pt", args.pictures, seed=1), encode_pictures(args)
    vae = new_vae()
    vae.load_state_dict(torch.load(args.output / "vae.pt")["average"])
    vae.encoder.requires_grad_(False)
    run = Run(vae.to(args.device), args.output / "decoder.pt", samples=args.decoder_samples, batch=16, lr=1e-3)
    forward = torch.compile(vae.decoder) if args.compile else vae.decoder
    student = final_student(args)
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        images = data["images"][rows].to(args.device).float() / 127.5 - 1
        z = latents["latents"][rows].to(args.device)
        z = z + 0.25 * torch.rand(run.batch, 1, 1, 1).to(z) * torch.randn_like(z)
        half = run.batch // 2
        with torch.no_grad():
            noise = couple(torch.randn_like(z[:half]), latents["chance"][rows[:half]])
            z[:half] = one_step(
                student, noise, student.embed([str(latents["requests"][i]) for i in rows[:half].tolist()])
            )
        run.step(vae_losses(forward(z / latents["scale"]), images))


def explore(args: argparse.Namespace, reward: Reward, round_: int) -> dict:
    """Lets the current reward be climbed on training prompts, and has the judge look at the pictures along the way."""
    student = final_student(args)
    vae, scale = final_vae(args), encode_pictures(args)["scale"]
    rng, generator = random.Random(1000 + round_), torch.Generator().manual_seed(1000 + round_)
    found: dict[str, list] = {"images": [], "prompts": [], "seen": [], "right": []}
    for _ in range(args.climbs // 32):
        prompts = [str(sample_request(rng)) for _ in range(32)]
        noise = torch.randn(32, 8, 8, 8, generator=generator).to(args.device)
        climb = ascend(student, vae, scale, reward, noise, prompts, steps=20)
        for step, (_, images, _) in enumerate(climb):
            if step in (0, 4, 10, 20):
                verdicts = judge(images, prompts)
                found["images"].append((images.cpu() * 255).round().byte())
                found["prompts"] += prompts
                found["seen"] += [v.found for v in verdicts]
                found["right"] += [v.correct for v in verdicts]
    right = torch.tensor(found["right"]).view(-1, 4, 32).float().mean((0, 2))
    print(f"round {round_}: right after 0, 4, 10, 20 steps {[round(r, 3) for r in right.tolist()]}", flush=True)
    return found | {"images": torch.cat(found["images"])}


def ranked(reward: Reward, images: Tensor, prompts: Sequence[str], right: Tensor) -> dict[str, Tensor]:
    """Right above wrong, and each on its side of the bias; images (B, 3, 64, 64), whether they are right (B,)."""
    scores = reward(images, prompts)
    order = F.softplus(1.0 + scores[~right][None] - scores[right][:, None])
    sides = F.softplus(torch.where(right, reward.bias - scores, scores - reward.bias))
    return {"order": order.mean() if order.numel() else scores.sum() * 0, "side": 0.5 * sides.mean()}


def harden_clip(args: argparse.Namespace) -> None:
    """Trains the reward on what the student draws and on what climbing the reward makes of it, for some rounds.

    Half of each batch are drawn pictures as before, so that the reward does not forget them.
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
        prompts, seen = ([text for c in climbs for text in c[key]] for key in ("prompts", "seen"))
        run.samples = (round_ + 1) * args.round_samples
        for _ in run:
            half = run.batch // 2
            yes, no = right.nonzero().squeeze(1), (~right).nonzero().squeeze(1)
            rows = torch.cat([side[torch.randint(0, len(side), (half,))] for side in (yes, no)])
            generated = blemish(images[rows].to(args.device).float() / 255)
            losses = ranked(run.model, generated, [prompts[i] for i in rows.tolist()], right[rows].to(args.device))
            run.step(losses | drawn_losses(run.model, data, failed, half, rng))
    run.save()


def export(args: argparse.Namespace) -> None:
    """Writes the weights in half precision as stock pipelines and a stock CLIP model."""
    from diffusers import StableDiffusionPipeline

    folder = args.output / "weights"
    vae = final_vae(args).cpu()
    vae.register_to_config(scaling_factor=round(encode_pictures(args)["scale"], 6))
    for name, stage in (("guided", "unet"), ("turbo", "student")):
        if not (args.output / f"{stage}.pt").exists():
            continue
        model = averaged(args.output / f"{stage}.pt", Generator())
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=model.unet,
            scheduler=model.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(torch.float16).save_pretrained(folder / name)
        vae.float()
    hardened = args.output / "hardened.pt"
    reward = averaged(hardened if hardened.exists() else args.output / "clip.pt", Reward())
    reward.clip.half().save_pretrained(folder / "clip")
    reward.tokenizer.save_pretrained(folder / "clip")
    half = [0.5, 0.5, 0.5]
    processor = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIZE}}
    processor |= {"do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}, "do_rescale": True}
    processor |= {"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": half, "image_std": half, "resample": 3}
    (folder / "clip" / "preprocessor_config.json").write_text(
        json.dumps(processor | {"do_convert_rgb": True}, indent=2)
    )


def auc(right: Tensor, wrong: Tensor) -> float:
    """The chance that a right picture scores above a wrong one."""
    return float((right[:, None] > wrong).float().mean()) if len(right) and len(wrong) else math.nan


def by_category(prompts: Sequence[str], right: Sequence[bool]) -> str:
    """Shares of right pictures, in words."""
    groups = {c: [r for p, r in zip(prompts, right, strict=True) if category(p) == c] for c in CATEGORIES}
    shares = "  ".join(f"{c} {sum(g) / len(g):.2f}" for c, g in groups.items() if g)
    return f"{sum(right) / len(right):.3f}  ({shares})"


def report(args: argparse.Namespace) -> None:
    """Prints how often pictures of validation prompts are right, how well the reward knows, what climbing repairs."""
    vae, scale = final_vae(args), encode_pictures(args)["scale"]
    generator = torch.Generator().manual_seed(7)
    prompts = list(VALIDATION_PROMPTS[: args.report_prompts])
    noise = torch.randn(len(prompts), 8, 8, 8, generator=generator).to(args.device)
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    sample = data["images"][-256:].float() / 255
    with torch.no_grad():
        again = vae.decoder(vae.encoder(sample.to(args.device) * 2 - 1)) / 2 + 0.5
    texts = [str(request) for request in data["requests"][-256:]]
    print("autoencoder ", by_category(texts, [v.correct for v in judge(again, texts)]), flush=True)
    if (args.output / "unet.pt").exists():
        teacher = averaged(args.output / "unet.pt", Generator()).to(args.device)
        images = decode(vae, teacher.sample(noise, prompts, steps=6, guidance=3.0), scale)
        print("guided, 6 steps", by_category(prompts, [v.correct for v in judge(images, prompts)]), flush=True)
    student = final_student(args)
    hardened = args.output / "hardened.pt"
    reward = averaged(hardened if hardened.exists() else args.output / "clip.pt", Reward()).to(args.device)
    first: list[bool] = []
    for step, (_, images, scores) in enumerate(ascend(student, vae, scale, reward, noise, prompts, args.report_steps)):
        if step not in (0, 10, 20, 50):
            continue
        right = [v.correct for v in judge(images, prompts)]
        first = first or right
        repaired = [r for r, before in zip(right, first, strict=True) if not before]
        flags = torch.tensor(right)
        print(
            f"one step, after {step} steps of ascent: {by_category(prompts, right)}  score {scores.mean():.2f}",
            flush=True,
        )
        print(f"  repaired {sum(repaired)}/{len(repaired)}  AUC {auc(scores[flags], scores[~flags]):.3f}", flush=True)


STAGES = {
    "vae": train_vae,
    "clip": train_clip,
    "latents": encode_pictures,
    "unet": train_unet,
    "student": train_student,
    "decoder": train_decoder,
    "harden": harden_clip,
    "export": export,
    "report": report,
}


def main() -> None:
    """Reads the command line and runs the stages."""
    parser = argparse.ArgumentParser(description="Trains the models of the shapes world.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--vae-samples", type=int, default=200_000)
    parser.add_argument("--pictures", type=int, default=30_000)
    parser.add_argument("--climbs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-samples", type=int, default=12_800)
    parser.add_argument("--report-prompts", type=int, default=96)
    parser.add_argument("--report-steps", type=int, default=50)
    parser.add_argument("--unet-samples", type=int, default=600_000)
    parser.add_argument("--student-samples", type=int, default=120_000)
    parser.add_argument("--decoder-samples", type=int, default=16_000)
    parser.add_argument("--clip-samples", type=int, default=120_000)
    parser.add_argument("--failures", type=int, default=16_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
