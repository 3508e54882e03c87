"""Checks for pipelines with adapters, arguments, dtypes and memory settings composed into them."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from problems import generator, redness

from noiseopt import NoiseOptimizationMixin, NoiseResult, ReNO, optimize_noise
from noiseopt.evaluation.looking import Looking
from noiseopt.pipelines.problem import NoiseProblem
from noiseopt.pipelines.sampling.first_call import stock_call

EMBEDS = {
    "sd": ("prompt_embeds", "negative_prompt_embeds"),
    "sdxl": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "flux": ("prompt_embeds", "pooled_prompt_embeds"),
}


class Painter(NoiseOptimizationMixin, StableDiffusionPipeline):
    """Pipeline class of a user in an importable module."""


@torch.no_grad()
def embeddings_of(pipe, family: str) -> dict[str, torch.Tensor]:
    """Return the embeddings of the prompt "a b", guided against "c" in families with guidance."""
    if family == "flux":
        encoded = pipe.encode_prompt("a b", None)
    else:
        guided = {"do_classifier_free_guidance": True, "negative_prompt": "c"}
        encoded = pipe.encode_prompt("a b", device="cpu", num_images_per_prompt=1, **guided)
    return dict(zip(EMBEDS[family], encoded, strict=False))


def draw(pipe, prompt: Any = "a b", **arguments) -> torch.Tensor:
    """Return the images `(B, 3, H, W)` of a stock call in float32 or better."""
    arguments = {"generator": generator(), **arguments}
    images = pipe(prompt, output_type="pt", **arguments).images
    return images.to(torch.promote_types(images.dtype, torch.float32))


def check_composition(
    pipe, prompt: Any = "a b", *, oracle: str | None = "stock", rtol: float = 1e-4, **arguments
) -> NoiseResult:
    """Run ReNO and assert that it honors the composition of the pipeline and leaves it unchanged.

    The baseline equals the image of the stock call, the stock call reproduces the image of the result, the gradient
    equals that of the stock call, and modules and images are the same afterwards.

    Args:
        pipe, prompt, arguments: The call.
        oracle: Oracle of the gradient: the differentiated "stock" call, or `None` for no check.
        rtol: Tolerance of the gradient relative to its norm.
    """
    state, plain = state_of(pipe), draw(pipe, prompt, **fresh(arguments))
    method = ReNO(rewards=redness, steps=3)
    result = optimize_noise(pipe, prompt, method, reward_prompt="a b", **{"generator": generator(), **fresh(arguments)})
    assert result.images is not None and result.initial_images is not None
    assert torch.equal(result.initial_images, plain)
    torch.testing.assert_close(result.losses[0], -redness(plain, None), rtol=1e-5, atol=1e-6)
    assert (result.losses.min(0).values < result.losses[0]).all()
    again = draw(pipe, prompt, **{**arguments, "latents": result.latents, "generator": result.generator()})
    assert torch.equal(again, result.images)
    if oracle == "stock":
        check_gradient(pipe, prompt, rtol, **arguments)
    assert state_of(pipe) == state
    assert torch.equal(draw(pipe, prompt, **fresh(arguments)), plain)
    return result


def fresh(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with copies of their generators."""
    given = arguments.get("generator")
    if given is None:
        return arguments
    return {
        **arguments,
        "generator": [x.clone_state() for x in given] if isinstance(given, list) else given.clone_state(),
    }


def check_gradient(pipe, prompt: Any, rtol: float, **arguments) -> None:
    """Assert that the gradient equals that of the stock call without its `no_grad`, from its `latents`."""
    sampler, noise, result = capture(pipe, prompt, **arguments)
    leaf = noise.clone().requires_grad_()
    images = sampler.images(leaf, "full")
    weights = torch.randn(images.shape, generator=generator(2))
    (found,) = torch.autograd.grad((images * weights).sum(), leaf)
    latents = result.latents.detach().clone().requires_grad_()
    arguments |= {"latents": latents, "generator": result.generator(), "output_type": "pt"}
    with torch.enable_grad():
        images = stock_call(type(pipe))(pipe, prompt, **arguments).images
        (expected,) = torch.autograd.grad((images.float() * weights).sum(), latents)
    expected = sampler.space.unpack(sampler.twin, expected).float()
    assert (found - expected).norm() <= rtol * expected.norm()
    assert expected.norm() > 0


def capture(pipe, prompt: Any = "a b", *, clamp: str = "hard", **arguments):
    """Return the sampler of a call, its base noise, and the result of evaluating it."""
    seen: list[NoiseProblem] = []
    look = Looking(seen.append, clamp=clamp)  # stock pipelines have no gradient at saturated pixels
    result = optimize_noise(pipe, prompt, look, **{"generator": generator(), **fresh(arguments)})
    return seen[0].sampler, seen[0].noise.to(result.latents.dtype).float(), result


def state_of(pipe) -> dict[str, Any]:
    """Return the state of a pipeline's modules: modes, parameters, hooks, adapters, compiled blocks."""
    state: dict[str, Any] = {}
    for root, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            state[root] = id(part)
            continue
        for name, module in part.named_modules():
            kept = {key: id(value) for key, value in vars(module).items() if callable(value)}
            state[f"{root}.{name}"] = (id(module), module.training, kept, str(getattr(module, "scaling", None)))
        for name, parameter in part.named_parameters():
            layout = (parameter.dtype, parameter.device, parameter.stride(), parameter.requires_grad)
            state[f"{root}.{name}="] = (id(parameter), layout, parameter.grad is None, parameter._version)
    return state
