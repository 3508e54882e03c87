"""Noise Diffusion for Stable Diffusion 3."""

from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

from .noiseopt_bundle import NoiseDiffusionMixin


class NoiseDiffusionStableDiffusion3Pipeline(NoiseDiffusionMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` that chooses the initial noise by a scorer. See `NoiseDiffusionMixin`.

    Noise Diffusion: https://arxiv.org/abs/2411.16503.

    Examples:
        >>> model = "stabilityai/stable-diffusion-3.5-medium"
        >>> pipe = NoiseDiffusionStableDiffusion3Pipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")
        >>> image = pipe("a frog on a red bench", rewards="vqascore").images[0]
    """
