"""Never Too Late for FLUX.1-schnell.

Packing of latents: see `sampling/latent_space.py`.
"""

from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from .mixin import NeverTooLateMixin


class NeverTooLateFluxPipeline(NeverTooLateMixin, FluxPipeline):
    """`FluxPipeline` that makes the images of one prompt a diverse set. See `NeverTooLateMixin`.

    It's Never Too Late: https://arxiv.org/abs/2601.00090.

    Examples:
        >>> model = "black-forest-labs/FLUX.1-schnell"
        >>> pipe = NeverTooLateFluxPipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda")
        >>> one_step = {"num_inference_steps": 1, "guidance_scale": 0.0, "num_images_per_prompt": 4}
        >>> images = pipe("a dog", diversity={"dpp": 1.5}, guard={"hpsv2.1": {"threshold": 0.31}}, **one_step).images
    """
