"""CNO for Stable Diffusion 1 and 2."""

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from .noiseopt_bundle import CNOMixin


class CNOStableDiffusionPipeline(CNOMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that makes the images of one prompt differ. See `CNOMixin` for its arguments.

    Contrastive Noise Optimization: https://arxiv.org/abs/2510.03813.

    Examples:
        >>> model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        >>> pipe = CNOStableDiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")
        >>> images = pipe("a cat in a garden", num_images_per_prompt=5, guidance_scale=6.0).images
    """
