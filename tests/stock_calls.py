"""Calls of tiny stock pipelines with a callback per denoising step."""

import torch
from tiny_pipelines import SIZE, tiny_pipeline

FAMILIES = ("sd", "sdxl", "sd3", "flux")
STEPS = 6


def draw(family_or_pipe, callback=None, prompt="a", *, seed=None, inputs=None, images=2, generator=None, **arguments):
    """Return the final latents `(B, ...)` of a call, by default of 2 images of a prompt with guidance.

    Args:
        family_or_pipe: A family of `tiny_pipelines`, or a pipeline.
        callback: Callback after each step.
        prompt: One prompt or several.
        seed: Generator of the callback, which is reset.
        inputs: Names of the tensors of the callback; by default all that it declares.
        images: Images per prompt.
        generator: Generator of the pipeline; by default a new one with the same seed.
    """
    pipe = tiny_pipeline(family_or_pipe) if isinstance(family_or_pipe, str) else family_or_pipe
    if seed is not None:
        seed.manual_seed(7)
    steered = {}
    if callback is not None:
        steered = {"callback_on_step_end": callback}
        steered["callback_on_step_end_tensor_inputs"] = inputs or [*dict.fromkeys(callback.tensor_inputs)]
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, **SIZE, **steered, **arguments}
    generator = generator or torch.Generator().manual_seed(0)
    return pipe(prompt, num_images_per_prompt=images, generator=generator, output_type="latent", **call).images
