"""The untrained models of the shapes world, from stock classes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noiseopt.shapes_world.world import SIZE

from .optimization import averaged
from .text import MAX_LENGTH, new_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny
    from transformers import CLIPModel, CLIPTokenizer

# Shared by the U-Nets and schedulers of the SD and SDXL families.
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "layers_per_block": 1,
    "block_out_channels": (64, 96),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


def new_vae() -> AutoencoderTiny:
    """Build an untrained autoencoder from 64x64 pixels to 8x8 latents of 8 channels."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(0, 0, 2, 3),
        num_decoder_blocks=(3, 2, 1, 0),
        scaling_factor=1.0,
    )


def text_options(tokenizer: CLIPTokenizer) -> dict:
    """Return the options shared by the text encoders of the reward and the generators."""
    return {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }


def new_clip(**vision: int) -> CLIPModel:
    """Build an untrained dual encoder with a fixed temperature: scores are 20 times the cosine.

    Takes other settings of its image encoder than the default.
    """
    from transformers import CLIPConfig, CLIPModel

    tokenizer = new_tokenizer()
    tower = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 96}
    config = CLIPConfig(
        text_config=tower | text_options(tokenizer),
        vision_config=tower | {"num_hidden_layers": 3, "image_size": SIZE, "patch_size": 8} | vision,
        projection_dim=96,
        logit_scale_init_value=math.log(20.0),
    )
    model = CLIPModel(config)
    model.logit_scale.requires_grad_(False)
    return model


class Reward(nn.Module):
    """A CLIP model with a bias, the threshold score of right images; only the CLIP model is exported."""

    def __init__(self, **vision: int) -> None:
        super().__init__()
        self.clip = new_clip(**vision)
        self.bias = nn.Parameter(torch.tensor(10.0))
        self.tokenizer = new_tokenizer()

    def embed_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, 64, 64) in [0, 1] as (B, 96) of unit length."""
        pooled = self.clip.vision_model(pixel_values=images * 2 - 1).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Encode B prompts as (B, 96) of unit length."""
        tokens = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.bias.device)
        pooled = self.clip.text_model(input_ids=tokens.input_ids).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)


class VPGenerator(nn.Module):
    """Base of generators with a variance-preserving schedule; subclasses define `unet`, `embed` and `predict`."""

    last = 999.0  # the timestep of pure noise
    unet: nn.Module
    scheduler: Any

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def embed(self, prompts: Sequence[str]) -> Any:
        """Return the conditioning for B prompts, as in the stock pipeline."""
        raise NotImplementedError

    def predict(self, noisy: Tensor, t: Tensor, context: Any) -> Tensor:
        """Return v, given the output of `embed`."""
        raise NotImplementedError

    def times(self, count: int) -> Tensor:
        """Sample training timesteps, (count,) in [0, 998]."""
        return (1000 * torch.sigmoid(0.3 + 1.3 * torch.randn(count))).floor().clamp(max=998)

    def corrupt(self, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents at timesteps t, (B,), and their v.

        At t = 999 they are pure noise and the v that leads from it to z.
        """
        level = self.scheduler.alphas_cumprod.to(self.device)[t.long()].view(-1, 1, 1, 1)
        noisy, v = level.sqrt() * z + (1 - level).sqrt() * noise, level.sqrt() * noise - (1 - level).sqrt() * z
        pure = (t == self.last).view(-1, 1, 1, 1)
        straight = (level.sqrt() * noise - z) / (1 - level).sqrt()
        return torch.where(pure, noise, noisy), torch.where(pure, straight, v)

    def picture(self, noise: Tensor, v: Tensor) -> Tensor:
        """Return the scaled latents that v leads to from pure noise."""
        alpha = float(self.scheduler.alphas_cumprod[int(self.last)])
        return math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * v

    def forward(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return v of noisy latents (B, 8, 8, 8) at timesteps t, (B,) in [0, 999]."""
        return self.predict(noisy, t, self.embed(prompts))


class Generator(VPGenerator):
    """The SD U-Net and its text encoder, trained together; predicts v."""

    def __init__(self) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        self.tokenizer = new_tokenizer()
        tower = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 96}
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**tower, **text_options(self.tokenizer)))
        self.unet = UNet2DConditionModel(**UNET, cross_attention_dim=96)
        self.scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Encode B prompts as (B, 16, 96)."""
        tokens = self.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(self.device)).last_hidden_state

    def predict(self, noisy: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Return v, given the output of `embed`."""
        return self.unet(noisy, t, context).sample


def decode(vae: AutoencoderTiny, latents: Tensor, scale: float) -> Tensor:
    """Decode scaled latents (B, 8, 8, 8) to images (B, 3, 64, 64) in [0, 1]."""
    return (vae.decoder(latents / scale) / 2 + 0.5).clamp(0.0, 1.0)


def final_vae(args: argparse.Namespace) -> AutoencoderTiny:
    """Return the autoencoder with its latest decoder."""
    path = args.output / "decoder.pt"
    return averaged(path if path.exists() else args.output / "vae.pt", new_vae()).to(args.device)


def final_student(args: argparse.Namespace) -> Generator:
    """Load the one-step student, or if it is not trained yet, the teacher that it starts from."""
    path = args.output / "student.pt"
    return averaged(path if path.exists() else args.output / "unet.pt", Generator()).to(args.device)
