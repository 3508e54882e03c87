"""Noise Diffusion for SDXL."""

from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from .mixin import NoiseDiffusionMixin


class NoiseDiffusionStableDiffusionXLPipeline(NoiseDiffusionMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that chooses the initial noise by a scorer. See `NoiseDiffusionMixin`.

    Noise Diffusion: https://arxiv.org/abs/2411.16503.

    Examples:
        >>> model = "stabilityai/stable-diffusion-xl-base-1.0"
        >>> pipe = NoiseDiffusionStableDiffusionXLPipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")
        >>> image = pipe("a frog on a red bench", rewards="vqascore").images[0]
    """
