"""Noise Diffusion for FLUX.1.

Packing of latents: see `sampling/latent_space.py`.
"""

from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from .mixin import NoiseDiffusionMixin


class NoiseDiffusionFluxPipeline(NoiseDiffusionMixin, FluxPipeline):
    """`FluxPipeline` that chooses the initial noise by a scorer. See `NoiseDiffusionMixin`.

    Noise Diffusion: https://arxiv.org/abs/2411.16503.

    Examples:
        >>> model = "black-forest-labs/FLUX.1-dev"
        >>> pipe = NoiseDiffusionFluxPipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")
        >>> image = pipe("a frog on a red bench", rewards="vqascore").images[0]
    """
