"""Never Too Late for SD-Turbo and other one-step Stable Diffusion models."""

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from .noiseopt_bundle import NeverTooLateMixin


class NeverTooLateStableDiffusionPipeline(NeverTooLateMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that makes the images of one prompt a diverse set. See `NeverTooLateMixin`.

    It's Never Too Late: https://arxiv.org/abs/2601.00090.

    Examples:
        >>> model = "stabilityai/sd-turbo"
        >>> pipe = NeverTooLateStableDiffusionPipeline.from_pretrained(model, dtype=torch.float16).to("cuda")
        >>> one_step = {"num_inference_steps": 1, "guidance_scale": 0.0, "num_images_per_prompt": 4}
        >>> images = pipe("a dog in a park", diversity={"dpp": 150.0}, rewards={"hpsv2.1": 3.0}, **one_step).images
    """
