"""CNO for SDXL and SDXL-Lightning."""

from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from .mixin import CNOMixin


class CNOStableDiffusionXLPipeline(CNOMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that makes the images of one prompt differ. See `CNOMixin` for its arguments.

    Contrastive Noise Optimization: https://arxiv.org/abs/2510.03813.

    Examples:
        >>> model = "stabilityai/stable-diffusion-xl-base-1.0"
        >>> pipe = CNOStableDiffusionXLPipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")
        >>> images = pipe("a cat in a garden", num_images_per_prompt=5, guidance_scale=6.0).images
    """
