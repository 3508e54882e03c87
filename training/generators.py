"""The untrained generators, from stock classes: U-Nets of the SD and SDXL families, a transformer of the SD3 family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from noiseopt.shapes_world.world import SIZE

from .autoencoder import CHANNELS
from .text import new_tokenizer, text_options

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer, T5EncoderModel, T5Tokenizer

SIDE = SIZE // 4  # of the latents
TEXT_WIDTH = 96
WIDTHS = 96, 128  # of the two text encoders
EMPTY_TOKENS = 16  # `max_sequence_length` in calls of the embedded SD3 model; the default is 256
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
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


class Diffusion(nn.Module):
    """Base of generators with a variance-preserving schedule that predict v."""

    unet: nn.Module
    scheduler: Any
    tokenizer: CLIPTokenizer

    @property
    def denoiser(self) -> Any:
        """The module that predicts."""
        return self.unet

    def embed(self, prompts: Sequence[str]) -> Any:
        """Return the conditioning for B prompts, as in the stock pipeline."""
        raise NotImplementedError

    def predict(self, noisy: Tensor, t: Tensor, context: Any) -> Tensor:
        """Return v of noisy latents (B, 4, 32, 32) at timesteps t, (B,), given the output of `embed`."""
        raise NotImplementedError

    def corrupt(self, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents at timesteps t, (B,), and their v."""
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


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Configure a text encoder of three layers, used for its second-to-last hidden state and its pooled output."""
    from transformers import CLIPTextConfig

    tower: dict[str, Any] = text_options(tokenizer)
    tower.update(num_hidden_layers=3, hidden_size=width, intermediate_size=256, num_attention_heads=4)
    return CLIPTextConfig(**tower, projection_dim=width)


class SDXLGenerator(Diffusion):
    """A U-Net with two text encoders, a pooled embedding and the six size conditions."""

    def __init__(self) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        super().__init__()
        self.tokenizer = new_tokenizer()
        self.text_encoder = CLIPTextModel(text_config(self.tokenizer, WIDTHS[0]))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(self.tokenizer, WIDTHS[1]))
        self.unet = UNet2DConditionModel(
            **UNET,
            cross_attention_dim=sum(WIDTHS),
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=6 * 16 + WIDTHS[1],
        )
        self.scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)

    def begin_with(self, other: SDGenerator) -> None:
        """Initialize from an SD generator; new weights start without effect."""
        with torch.no_grad():
            theirs = dict(other.unet.named_parameters())
            for name, ours in self.unet.named_parameters():
                if name in theirs:
                    ours.zero_()
                    ours[tuple(slice(size) for size in theirs[name].shape)] = theirs[name]
            added: Any = self.unet.add_embedding
            nn.init.zeros_(added.linear_2.weight)
            nn.init.zeros_(added.linear_2.bias)
        self.text_encoder.load_state_dict(other.text_encoder.state_dict(), strict=False)

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode B prompts as (B, 16, 224) and pooled (B, 128), zeros for an empty one, as in the stock pipeline."""
        device = self.denoiser.device
        tokens = self.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids.to(device)
        first = self.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        said = torch.tensor([bool(prompt) for prompt in prompts], device=device)
        context = torch.cat((first, second.hidden_states[-2]), -1) * said[:, None, None]
        return context, second.text_embeds * said[:, None]

    def predict(self, noisy: Tensor, t: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        sizes = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=noisy.device).expand(len(noisy), -1)
        added = {"text_embeds": context[1], "time_ids": sizes}
        return self.unet(noisy, t, context[0], added_cond_kwargs=added).sample

    def pipeline(self, vae: Any) -> Any:
        """Assemble the stock pipeline."""
        from diffusers import StableDiffusionXLPipeline

        parts = {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        parts |= {"tokenizer": self.tokenizer, "tokenizer_2": self.tokenizer, "scheduler": self.scheduler, "vae": vae}
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)


class OneForMany(TorchFunctionMode):
    """Makes the last key of every attention count as `many` equal ones."""

    def __init__(self, many: int) -> None:
        super().__init__()
        self.many = many

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            bias = args[1].new_zeros(args[1].shape[-2])
            bias[-1] = math.log(self.many)
            kwargs["attn_mask"] = bias.expand(args[0].shape[-2], -1)
        return func(*args, **kwargs)


def silent_encoder(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """Return a T5 whose embeddings are zero, as SD3 takes them to be without its third text encoder, and a tokenizer.

    Without that encoder a saved pipeline loads only with `text_encoder_3=None, tokenizer_3=None`.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    config = T5Config(vocab_size=3, d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1, use_cache=False)
    encoder = T5EncoderModel(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.zeros_(parameter)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return encoder, T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=256)


class SD3Generator(nn.Module):
    """A flow-matching transformer of the SD3 family without its third text encoder; predicts noise minus image.

    In place of that encoder, the stock pipeline pads with empty tokens. The transformer has no text positions: equal
    tokens stay equal, so one token can count as any number of them. Training samples that number.
    """

    def __init__(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection

        super().__init__()
        self.tokenizer = new_tokenizer()
        self.text_encoder = CLIPTextModelWithProjection(text_config(self.tokenizer, WIDTHS[0]))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(self.tokenizer, WIDTHS[1]))
        self.transformer = SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=sum(WIDTHS),
            caption_projection_dim=128,
            pooled_projection_dim=sum(WIDTHS),
            pos_embed_max_size=SIDE // 2,
            qk_norm="rms_norm",
        )
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    @property
    def denoiser(self) -> Any:
        """The module that predicts."""
        return self.transformer

    def begin_with(self, other: SDGenerator) -> None:
        """Initialize from the text encoder of an SD generator."""
        self.text_encoder.load_state_dict(other.text_encoder.state_dict(), strict=False)

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode B prompts as (B, 17, 224), the last token zero, and pooled (B, 224)."""
        tokens = self.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids.to(
            self.transformer.device
        )
        both = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        context = torch.cat([out.hidden_states[-2] for out in both], -1)
        return F.pad(context, (0, 0, 0, 1)), torch.cat([out.text_embeds for out in both], -1)

    def predict(self, noisy: Tensor, t: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """Return the velocity of noisy latents (B, 4, 32, 32) at timesteps t, (B,), given the output of `embed`."""
        with OneForMany(int(2 ** (4 + 4 * torch.rand(()))) if self.training else EMPTY_TOKENS):
            return self.transformer(noisy, context[0], context[1], t).sample

    def times(self, count: int) -> Tensor:
        """Sample training timesteps, (count,) in (0, 1000]."""
        return 1000 * torch.sigmoid(0.8 + 1.2 * torch.randn(count))

    def corrupt(self, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents at timesteps t, (B,), and their velocity."""
        sigma = (t / 1000).view(-1, 1, 1, 1)
        return torch.lerp(z, noise, sigma), noise - z

    def pipeline(self, vae: Any) -> Any:
        """Assemble the stock pipeline."""
        from diffusers import StableDiffusion3Pipeline

        encoder, tokenizer = silent_encoder(sum(WIDTHS))
        parts = {
            "transformer": self.transformer,
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
        }
        parts |= {"tokenizer": self.tokenizer, "tokenizer_2": self.tokenizer, "scheduler": self.scheduler, "vae": vae}
        return StableDiffusion3Pipeline(**parts, text_encoder_3=encoder, tokenizer_3=tokenizer).to(self.denoiser.device)
