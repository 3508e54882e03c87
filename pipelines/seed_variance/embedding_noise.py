"""Embedding noise: random noise on the prompt's embedding in the first steps."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ...checked_fields import checked
from ...private_names import is_modular
from ...schedulers.noise_samplers import NoiseSamplerSpec
from ..request import images_per_prompt
from .steered_call import SteeredCall, SteeredRun, part_of

Embedding = torch.Tensor | list[torch.Tensor]
GIVEN = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingNoise(SteeredCall):
    """Adds noise to the prompt's embedding in the first steps, as seed variance nodes do in other programs.

    Different seeds then have different prompts, so to say, and their images differ more; what it costs is how well they
    follow the prompt. It takes no time. For each image, with y `(L, D)` its embedding and σ the standard deviation of
    the entries of its tokens, some of these entries become

        y + strength·σ·u,   u ~ uniform on [−1, 1];   each entry with probability `density`, else it stays

    The recipe is that of ComfyUI's SeedVarianceEnhancer, whose strength is in the units of y, with InvokeAI's unit σ
    (strengths of 0.1 to 0.5 there). After the first steps the pipeline goes on with y itself. A call of one step has
    the noise throughout. Tokens are those of the attention mask, if the pipeline's `encode_prompt` returns one beside
    y, else those that are not zero. Entries that are 0, as where an embedding is filled up, stay 0. Negative prompts
    and pooled embeddings get no noise.

        images = EmbeddingNoise(strength=0.5).generate(pipe, prompt, num_images_per_prompt=4).images

    Args:
        strength: The half-width of the noise, in units of σ; 0 is the plain call.
        density: The probability that an entry gets noise, in (0, 1].
        steps: The share of the denoising steps with noise, in (0, 1], rounded up.
        protect_first: The share of the tokens at the beginning that get no noise, in [0, 1], rounded up.
        protect_last: That at the end.
        generator: See `SteeredCall`.

    Raises:
        ValueError: For a value outside its range; for a call of a pipeline that cannot get y back after some steps.
        TypeError: For a pipeline without an `encode_prompt` that returns the embedding first.
    """

    strength: float = checked(0.5, "[0, inf)")
    density: float = checked(0.5, "(0, 1]")
    steps: float = checked(0.2, "(0, 1]")
    protect_first: float = checked(0.0, "[0, 1]")
    protect_last: float = checked(0.0, "[0, 1]")

    def run(self, pipe, request: dict[str, Any], noise_sampler: NoiseSamplerSpec | None) -> "EmbeddingNoiseRun":
        return EmbeddingNoiseRun(pipe, self, request, noise_sampler)

    def noised(self, y: torch.Tensor, valid: torch.Tensor, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return an embedding `(L, D)` with noise on its tokens, those where `valid` `(L,)` is true."""
        tokens, place = int(valid.sum()), valid.cumsum(0) - 1
        first, last = part_of(self.protect_first, tokens), tokens - part_of(self.protect_last, tokens)
        entries = valid[:, None] & y.ne(0)
        free = entries & (place >= first)[:, None] & (place < last)[:, None]
        chosen = (draw(torch.rand, *y.shape) < self.density).to(y.device) & free
        noise = (2 * draw(torch.rand, *y.shape) - 1).to(y.device)
        if not self.strength or not chosen.any():
            return y
        spread = y[entries].float().std(correction=0)
        return torch.where(chosen, (y.float() + self.strength * spread * noise).to(y.dtype), y)


class EmbeddingNoiseRun(SteeredRun):
    """One call with embedding noise."""

    def __init__(
        self, pipe, settings: EmbeddingNoise, request: dict[str, Any], noise_sampler: NoiseSamplerSpec | None
    ) -> None:
        super().__init__(pipe, request, noise_sampler)
        self.settings, self.encoding = settings, 0
        self.clean: Embedding | None = None  # y, once it is known
        encode = None if is_modular(pipe) else getattr(pipe, "encode_prompt", None)  # its blocks keep the embedding
        if encode is None:
            raise TypeError(
                f"Expected a pipeline with `encode_prompt`, but {type(pipe).__name__} has none. Optimize its initial "
                "noise instead, with `optimize_noise`."
            )
        if "num_images_per_prompt" not in inspect.signature(encode).parameters:
            self.request = one_prompt_for_each_image(request)
        if settings.steps < 1 and request.get("num_inference_steps") != 1:
            self.request = {**self.request, **self.returning(pipe)}

    def returning(self, pipe) -> dict[str, Any]:
        """Return the arguments of a call whose callback gives y back. Raises `ValueError` if there is no such call."""
        if "prompt_embeds" not in getattr(pipe, "_callback_tensor_inputs", ()):
            raise ValueError(
                f"Expected a pipeline that takes `prompt_embeds` back from callbacks, but {type(pipe).__name__} does "
                "not. Pass `steps=1.0`, for noise in all steps."
            )
        theirs = self.request.get("callback_on_step_end")
        given = self.request.get("callback_on_step_end_tensor_inputs", ["latents"])
        tensors = list(dict.fromkeys([*getattr(theirs, "tensor_inputs", given), "prompt_embeds"]))
        callback = functools.partial(self.after_step, theirs)
        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": tensors}

    def hooks(self, pipe) -> dict[str, Callable[..., Any]]:
        return {**super().hooks(pipe), "encode_prompt": functools.partial(self.encode_prompt, pipe.encode_prompt)}

    def encode_prompt(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `encode_prompt`, and add noise to the embedding that the first call returns first."""
        self.encoding += 1
        try:
            encoded = encode(*args, **kwargs)
        finally:
            self.encoding -= 1
        if self.encoding or self.clean is not None:  # within another call, or of a negative prompt
            return encoded
        several = isinstance(encoded, tuple)
        self.clean = first = encoded[0] if several else encoded
        rows = first if isinstance(first, list | torch.Tensor) else ()
        if not len(rows) or any(not isinstance(y, torch.Tensor) or y.ndim != 2 for y in rows):
            raise TypeError(
                "Expected an `encode_prompt` that returns the embedding (B, L, D) first, but got "
                f"{type(first).__name__}. Optimize the initial noise instead, with `optimize_noise`."
            )
        noised = self.noised(rows, mask_of(encoded[1] if several and len(encoded) > 1 else None, rows))
        return (noised, *encoded[1:]) if several else noised

    def noised(self, rows: Any, valid: list[torch.Tensor]) -> Embedding:
        settings = self.settings
        draws = settings.draws(len(rows))
        found = [settings.noised(y, mask, draw) for y, mask, draw in zip(rows, valid, draws, strict=True)]
        return torch.stack(found) if isinstance(rows, torch.Tensor) else found

    def after_step(self, theirs: Any, pipe, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Give the pipeline y back after the last step with noise, and call the user's callback."""
        if step + 1 == part_of(self.settings.steps, pipe.num_timesteps):
            tensors["prompt_embeds"] = replaced(tensors["prompt_embeds"], self.clean, type(pipe).__name__)
        return tensors if theirs is None else {**tensors, **(theirs(pipe, step, timestep, tensors) or {})}


def mask_of(beside: Any, rows: Any) -> list[torch.Tensor]:
    """Return which tokens of embeddings count: by the mask that came beside them, else those that are not zero."""
    if (
        isinstance(beside, torch.Tensor)
        and beside.ndim == 2
        and beside.shape == torch.Size((len(rows), len(rows[0])))
        and not beside.is_floating_point()
    ):
        return list(beside.bool())
    return [y.ne(0).any(1) for y in rows]


def replaced(given: Any, clean: Any, name: str) -> Any:
    """Return the embeddings of a pipeline with the last rows, those of the prompt, replaced."""
    if isinstance(given, list):
        return [*given[: len(given) - len(clean)], *clean]
    if given.shape[1:] != clean.shape[1:] or len(given) % len(clean):
        raise ValueError(
            f"Expected prompt_embeds (B, L, D) as {name}.encode_prompt returns them, {tuple(clean.shape)}, but got "
            f"{tuple(given.shape)} in the steps. Pass `steps=1.0`, for noise in all steps."
        )
    return torch.cat([given[: len(given) - len(clean)], clean.to(given)])


def one_prompt_for_each_image(request: dict[str, Any]) -> dict[str, Any]:
    """Return the same request with each prompt as often as it has images, for pipelines that copy embeddings late."""
    count, found = images_per_prompt(request), {**request, "num_images_per_prompt": 1}
    for name in GIVEN:
        value = request.get(name)
        if isinstance(value, torch.Tensor):
            found[name] = value.repeat_interleave(count, 0)
        elif value is not None:
            found[name] = [each for each in ([value] if isinstance(value, str) else value) for _ in range(count)]
    return found if count > 1 else request
