"""The untrained generators, from stock classes: U-Nets of the SD and SDXL families, a transformer of the SD3 family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models import text_options
from ..text import new_tokenizer
from .autoencoder import CHANNELS
from .data import SIZE

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SIDE = SIZE // 4  # of the latents
TEXT_WIDTH = 96
UNET: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,  # diffusers' name of the number of heads
    "norm_num_groups": 16,
}
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,  # sampling starts with pure noise, so training has to reach it
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


class Diffusion(nn.Module):
    """Base of generators with a variance-preserving schedule that predict v; subclasses define `unet` and the rest."""

    unet: nn.Module
    scheduler: Any
    tokenizer: CLIPTokenizer

    def embed(self, prompts: Sequence[str]) -> Any:
        """Return the conditioning for B prompts, as in the stock pipeline."""
        raise NotImplementedError

    def predict(self, noisy: Tensor, t: Tensor, context: Any) -> Tensor:
        """Return v of noisy latents (B, 4, 32, 32) at timesteps t, (B,), given the output of `embed`."""
        raise NotImplementedError

    def corrupt(self, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents at timesteps t, (B,), and their v; pure noise at 999."""
        level = self.scheduler.alphas_cumprod.to(z.device)[t.long()].view(-1, 1, 1, 1)
        keep, add = level.sqrt(), (1 - level).sqrt()
        return keep * z + add * noise, keep * noise - add * z

    def times(self, count: int) -> Tensor:
        """Sample training timesteps, (count,) in [0, 999]; most where layout and content are decided."""
        t = (1000 * torch.sigmoid(0.8 + 1.1 * torch.randn(count))).floor().clamp(max=999)
        return torch.where(torch.rand(count) < 0.05, 999.0, t)


class SDGenerator(Diffusion):
    """The SD U-Net and its text encoder, trained together."""

    def __init__(self) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        self.tokenizer = new_tokenizer()
        tower = {"hidden_size": TEXT_WIDTH, "intermediate_size": 256, "num_attention_heads": 4}
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**tower, **text_options(self.tokenizer)))
        self.unet = UNet2DConditionModel(**UNET, cross_attention_dim=TEXT_WIDTH)
        self.scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Encode B prompts as (B, 16, 96)."""
        tokens = self.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(self.unet.device)).last_hidden_state

    def predict(self, noisy: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(noisy, t, context).sample

    def pipeline(self, vae: Any) -> Any:
        """Assemble the stock pipeline."""
        from diffusers import StableDiffusionPipeline

        parts = {"unet": self.unet, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer}
        parts |= {"scheduler": self.scheduler, "vae": vae, "safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(**parts, requires_safety_checker=False)
