"""CNO for Stable Diffusion 3."""

from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

from .mixin import CNOMixin


class CNOStableDiffusion3Pipeline(CNOMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` that makes the images of one prompt differ. See `CNOMixin` for its arguments.

    Contrastive Noise Optimization: https://arxiv.org/abs/2510.03813.

    Examples:
        >>> model = "stabilityai/stable-diffusion-3.5-medium"
        >>> pipe = CNOStableDiffusion3Pipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")
        >>> images = pipe("a cat in a garden", num_images_per_prompt=5).images
    """
