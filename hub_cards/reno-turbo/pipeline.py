"""ReNO for one-step SDXL models: SDXL-Turbo, Hyper-SDXL."""

from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from .noiseopt_bundle import ReNOMixin


class ReNOTurboPipeline(ReNOMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that optimizes the initial noise for rewards. See `ReNOMixin` for its arguments.

    Reward-based Noise Optimization: https://arxiv.org/abs/2406.04312.

    Examples:
        >>> pipe = ReNOTurboPipeline.from_pretrained("stabilityai/sdxl-turbo", dtype=torch.bfloat16).to("cuda")
        >>> image = pipe(
        ...     "a blue scooter in front of a green car",
        ...     rewards={"clipscore": 1.0},
        ...     num_inference_steps=1,
        ...     guidance_scale=0.0,
        ... ).images[0]
    """
