"""Trains every model of the shapes world from scratch, with one command:

    python -m noiseopt.shapes_world.train --device cpu --output DIR
"""

from __future__ import annotations

import argparse
import copy
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

from .captions import Request, caption, parse, sample_request
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
        self._share_gradients()
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
        for g, mean in zip(gradients, (flat / dist.get_world_size()).split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))

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
        scenes = [lay_out(r.objects, layout, r.relation) for r, layout in zip(requests, layouts)]
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
    gradient = sum(((output - image).diff(dim=dim) * weight.narrow(dim, 1, image.shape[dim] - 1)).abs().mean() for dim in (2, 3))
    return {"pixel": ((output - image).abs() * weight).mean(), "gradient": 0.5 * gradient}


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
    """Imitated failures of the scenes as uint8 pictures (N, 3, 64, 64), and whether they are right all the same, (N,)."""
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


def contrast(reward: Reward, texts: Tensor, images: Tensor, wrong: Tensor, bad: Tensor, same: Tensor) -> dict[str, Tensor]:
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


def train_clip(args: argparse.Namespace) -> None:
    """Trains the reward on drawn pictures, against wrong captions and imitated failures of each."""
    data = pictures(args.output / "pictures.pt", args.pictures, seed=1)
    scenes = data["scenes"][: args.failures]
    failed = failures(args.output / "failures.pt", scenes, seed=2)
    bad_rows = (~failed["right"]).nonzero().squeeze(1)
    run = Run(Reward().to(args.device), args.output / "clip.pt", samples=args.clip_samples, batch=64, lr=2e-3)
    rng = random.Random(3)
    for _ in run:
        rows = bad_rows[torch.randint(0, len(bad_rows), (run.batch,))]
        requests = [parse(caption(scenes[i], rng)) for i in rows.tolist()]
        wrong = [str(wrong_request(request, rng)) for request in requests for _ in range(3)]
        texts = run.model.embed_texts([str(request) for request in requests] + wrong)
        images = torch.cat((data["images"][rows], failed["images"][rows])).to(args.device).float() / 255
        images, bad = run.model.embed_images(blemish(images)).chunk(2)
        keys = [frozenset(request.objects) for request in requests]
        same = torch.tensor([[a == b for b in keys] for a in keys]).fill_diagonal_(False).to(args.device)
        run.step(contrast(run.model, texts[: run.batch], images, texts[run.batch :].unflatten(0, (-1, 3)), bad, same))



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


def train_decoder(args: argparse.Namespace) -> None:
    """Trains the decoder further on whole pictures and noisier latents: it must make clean shapes of what a U-Net draws."""
    data, latents = pictures(args.output / "pictures.pt", args.pictures, seed=1), encode_pictures(args)
    vae = new_vae()
    vae.load_state_dict(torch.load(args.output / "vae.pt")["average"])
    vae.encoder.requires_grad_(False)
    run = Run(vae.to(args.device), args.output / "decoder.pt", samples=args.decoder_samples, batch=16, lr=1e-3)
    forward = torch.compile(vae.decoder) if args.compile else vae.decoder
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        images = data["images"][rows].to(args.device).float() / 127.5 - 1
        z = (latents["latents"][rows] / latents["scale"]).to(args.device)
        output = forward(z + 0.2 * torch.rand(run.batch, 1, 1, 1).to(z) * torch.randn_like(z))
        run.step(vae_losses(output, images))


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
    """Trains the guided teacher, 3 of 8 samples at t = 999."""
    data = encode_pictures(args)
    model = Generator().to(args.device)
    if (args.output / "clip.pt").exists():
        tower = averaged(args.output / "clip.pt", Reward()).clip.text_model
        model.text_encoder.load_state_dict(tower.state_dict())
    run = Run(model, args.output / "unet.pt", samples=args.unet_samples, batch=64, lr=2.5e-3, decay=0.998)
    batch = run.batch // (dist.get_world_size() if dist.is_initialized() else 1)
    rng = random.Random(torch.initial_seed() + run.seen)
    for _ in run:
        run.step(coupled_losses(run.model, data, batch, rng, last=0.375))


def train_decoder(args: argparse.Namespace) -> None:
    """Trains the decoder further on whole pictures and noisier latents: it must make clean shapes of what a U-Net draws."""
    data, latents = pictures(args.output / "pictures.pt", args.pictures, seed=1), encode_pictures(args)
    vae = new_vae()
    vae.load_state_dict(torch.load(args.output / "vae.pt")["average"])
    vae.encoder.requires_grad_(False)
    run = Run(vae.to(args.device), args.output / "decoder.pt", samples=args.decoder_samples, batch=16, lr=1e-3)
    forward = torch.compile(vae.decoder) if args.compile else vae.decoder
    for _ in run:
        rows = torch.randint(0, len(data["images"]), (run.batch,))
        images = data["images"][rows].to(args.device).float() / 127.5 - 1
        z = (latents["latents"][rows] / latents["scale"]).to(args.device)
        output = forward(z + 0.2 * torch.rand(run.batch, 1, 1, 1).to(z) * torch.randn_like(z))
        run.step(vae_losses(output, images))


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


def train_unet(args: argparse.Namespace) -> None:
    """Trains the guided teacher on v; cells of the latent that show shapes count three times."""
    data = encode_pictures(args)
    model = Generator().to(args.device)
    if (args.output / "clip.pt").exists():
        tower = averaged(args.output / "clip.pt", Reward()).clip.text_model
        model.text_encoder.load_state_dict(tower.state_dict())
    run = Run(model, args.output / "unet.pt", samples=args.unet_samples, batch=64, lr=2e-3, decay=0.9985)
    batch = run.batch // (dist.get_world_size() if dist.is_initialized() else 1)
    rng = random.Random(torch.initial_seed() + run.seen)
    for _ in run:
        rows = torch.randint(0, len(data["latents"]), (batch,))
        prompts = [caption(data["scenes"][i], rng) if rng.random() > 0.1 else "" for i in rows.tolist()]
        z, mask = data["latents"][rows].to(args.device), data["masks"][rows].to(args.device)
        t = (1000 * torch.sigmoid(0.5 + 1.3 * torch.randn(batch))).long().clamp(max=999)
        t = torch.where(torch.rand(batch) < 0.06, 999, t).to(args.device)
        noise = torch.randn_like(z)
        noisy, v = model.scheduler.add_noise(z, noise, t), model.scheduler.get_velocity(z, noise, t)
        weight = 1 + 2 * mask
        error = (run.model(noisy, t, prompts) - v).square() * weight
        run.step({"v": error.mean() / weight.mean()})


def decode(vae: nn.Module, latents: Tensor, scale: float) -> Tensor:
    """Scaled latents (B, 8, 8, 8) -> pictures (B, 3, 64, 64) in [0, 1]."""
    return (vae.decoder(latents / scale) / 2 + 0.5).clamp(0.0, 1.0)


def final_vae(args: argparse.Namespace) -> nn.Module:
    """The autoencoder with the decoder as far as it has been trained."""
    path = args.output / "decoder.pt"
    return averaged(path if path.exists() else args.output / "vae.pt", new_vae()).to(args.device)


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


STAGES = {
    "vae": train_vae,
    "clip": train_clip,
    "latents": encode_pictures,
    "unet": train_unet,
    "decoder": train_decoder,
    "student": train_student,
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
    parser.add_argument("--unet-samples", type=int, default=600_000)
    parser.add_argument("--student-samples", type=int, default=120_000)
    parser.add_argument("--decoder-samples", type=int, default=40_000)
    parser.add_argument("--clip-samples", type=int, default=120_000)
    parser.add_argument("--failures", type=int, default=16_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        torch.manual_seed(dist.get_rank())
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
