"""Never Too Late for SDXL-Turbo and other one-step SDXL models."""

from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from .noiseopt_bundle import NeverTooLateMixin


class NeverTooLateTurboPipeline(NeverTooLateMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that makes the images of one prompt a diverse set. See `NeverTooLateMixin`.

    It's Never Too Late: https://arxiv.org/abs/2601.00090.

    Examples:
        >>> pipe = NeverTooLateTurboPipeline.from_pretrained("stabilityai/sdxl-turbo", dtype=torch.bfloat16).to("cuda")
        >>> one_step = {"num_inference_steps": 1, "guidance_scale": 0.0, "num_images_per_prompt": 4}
        >>> images = pipe("a dog in a park", diversity={"dpp": 150.0}, rewards={"hpsv2.1": 3.0}, **one_step).images
    """
