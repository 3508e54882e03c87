"""Untrained generators of the SDXL and SD3 families from stock classes, with two text encoders each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from noiseopt.shapes_world.world import SIZE

from .models import SCHEDULE, UNET, VPGenerator, text_options
from .text import new_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

WIDTHS = 96, 128  # of the two text encoders
EMPTY_TOKENS = 16  # `max_sequence_length` in calls of the embedded SD3 model; the default is 256


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Configure a text encoder of three layers, used for its second-to-last hidden state and its pooled output."""
    from transformers import CLIPTextConfig

    tower: dict[str, Any] = text_options(tokenizer)
    tower.update(num_hidden_layers=3, hidden_size=width, intermediate_size=256, num_attention_heads=4)
    return CLIPTextConfig(**tower, projection_dim=width)


class SDXLGenerator(VPGenerator):
    """A U-Net with two text encoders, a pooled embedding and the six size conditions; predicts v."""

    def __init__(self) -> None:
        from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
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
        self.scheduler = EulerDiscreteScheduler(**SCHEDULE)

    def begin_with(self, unet_weights: dict[str, Tensor], text_weights: dict[str, Tensor]) -> None:
        """Initialize from the SD U-Net and text encoder; new weights start without effect."""
        with torch.no_grad():
            for name, ours in self.unet.named_parameters():
                theirs = unet_weights.get(name)
                if theirs is None:
                    continue
                ours.zero_()
                ours[tuple(slice(size) for size in theirs.shape)] = theirs
            added: Any = self.unet.add_embedding
            nn.init.zeros_(added.linear_2.weight)
            nn.init.zeros_(added.linear_2.bias)
        self.text_encoder.load_state_dict(text_weights, strict=False)

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode B prompts as (B, 16, 224) and pooled (B, 128), zeros for an empty one, as in the stock pipeline."""
        tokens = self.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids.to(self.device)
        first = self.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        said = torch.tensor([bool(prompt) for prompt in prompts], device=self.device)
        context = torch.cat((first, second.hidden_states[-2]), -1) * said[:, None, None]
        return context, second.text_embeds * said[:, None]

    def predict(self, noisy: Tensor, t: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """Return v, given the output of `embed`."""
        sizes = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=self.device).expand(len(noisy), -1)
        added = {"text_embeds": context[1], "time_ids": sizes}
        return self.unet(noisy, t, context[0], added_cond_kwargs=added).sample


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


class SD3Generator(nn.Module):
    """A flow-matching transformer of the SD3 family without its third text encoder; predicts noise minus image.

    In place of that encoder, the stock pipeline pads with empty tokens. The transformer has no text positions: equal
    tokens stay equal, so one token can count as any number of them. Training samples that number.
    """

    last = 1000.0  # the timestep of pure noise

    def __init__(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection

        super().__init__()
        self.tokenizer = new_tokenizer()
        self.text_encoder = CLIPTextModelWithProjection(text_config(self.tokenizer, WIDTHS[0]))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(self.tokenizer, WIDTHS[1]))
        self.transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=8,
            out_channels=8,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=sum(WIDTHS),
            caption_projection_dim=128,
            pooled_projection_dim=sum(WIDTHS),
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def begin_with(self, text_weights: dict[str, Tensor]) -> None:
        """Initialize from the SD text encoder."""
        self.text_encoder.text_model.load_state_dict(text_weights, strict=False)

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode B prompts as (B, 17, 224), the last token zero, and pooled (B, 224)."""
        tokens = self.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids.to(self.device)
        both = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        context = torch.cat([out.hidden_states[-2] for out in both], -1)
        return F.pad(context, (0, 0, 0, 1)), torch.cat([out.text_embeds for out in both], -1)

    def predict(self, noisy: Tensor, t: Tensor, context: tuple[Tensor, Tensor], empty: int = EMPTY_TOKENS) -> Tensor:
        """Return the velocity, given the output of `embed`. Its one empty token stands for `empty` equal ones."""
        with OneForMany(empty):
            return self.transformer(noisy, context[0], context[1], t.expand(len(noisy))).sample

    def times(self, count: int) -> Tensor:
        """Sample training timesteps, (count,) in (0, 1000]."""
        return 1000 * torch.sigmoid(0.6 + 1.2 * torch.randn(count))

    def corrupt(self, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents at timesteps t, (B,), and the prediction target."""
        sigma = (t / 1000).view(-1, 1, 1, 1)
        return torch.lerp(z, noise, sigma), noise - z

    def picture(self, noise: Tensor, velocity: Tensor) -> Tensor:
        """Return the scaled latents that the velocity leads to from pure noise."""
        return noise - velocity

    def forward(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the velocity of noisy latents (B, 8, 8, 8), with a random number of empty tokens."""
        return self.predict(noisy, t, self.embed(prompts), empty=int(2 ** (4 + 4 * torch.rand(()))))


def from_noise(model: VPGenerator | SD3Generator, noise: Tensor, context: Any) -> Tensor:
    """Generate scaled latents from unit noise (B, 8, 8, 8) in one step without guidance.

    `context` is the output of the model's `embed`.
    """
    t = torch.full((len(noise),), model.last, device=noise.device)
    return model.picture(noise, model.predict(noise, t, context))
