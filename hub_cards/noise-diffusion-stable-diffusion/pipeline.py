"""Noise Diffusion for Stable Diffusion 1 and 2."""

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from .noiseopt_bundle import NoiseDiffusionMixin


class NoiseDiffusionStableDiffusionPipeline(NoiseDiffusionMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that chooses the initial noise by a scorer. See `NoiseDiffusionMixin`.

    Noise Diffusion: https://arxiv.org/abs/2411.16503.

    Examples:
        >>> model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        >>> pipe = NoiseDiffusionStableDiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")
        >>> image = pipe("a frog on a red bench", rewards="vqascore").images[0]
    """
