"""ReNO for SD-Turbo and other one-step Stable Diffusion models."""

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from .mixin import ReNOMixin


class ReNOStableDiffusionPipeline(ReNOMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that optimizes the initial noise for rewards. See `ReNOMixin` for its arguments.

    Reward-based Noise Optimization: https://arxiv.org/abs/2406.04312.

    Examples:
        >>> pipe = ReNOStableDiffusionPipeline.from_pretrained("stabilityai/sd-turbo", dtype=torch.bfloat16).to("cuda")
        >>> image = pipe(
        ...     "a blue scooter in front of a green car",
        ...     rewards={"clipscore": 1.0},
        ...     num_inference_steps=1,
        ...     guidance_scale=0.0,
        ... ).images[0]
    """
