"""CNO for FLUX.1.

Packing of latents: see `sampling/latent_space.py`.
"""

from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from .noiseopt_bundle import CNOMixin


class CNOFluxPipeline(CNOMixin, FluxPipeline):
    """`FluxPipeline` that makes the images of one prompt differ. See `CNOMixin` for its arguments.

    Contrastive Noise Optimization: https://arxiv.org/abs/2510.03813.

    Examples:
        >>> model = "black-forest-labs/FLUX.1-dev"
        >>> pipe = CNOFluxPipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")
        >>> images = pipe("a cat in a garden", num_images_per_prompt=5).images
    """
