"""The way back from a noise to a plain call of the pipeline: `latents=` and the generator that draw its image again."""

import contextlib
from typing import Any, Literal, NamedTuple

import torch

from .latent_space import first_of
from .random_state import RandomState

CLOSE = 2 / 255  # of two images in [0, 1] that are drawn from the same numbers, on any device


class Redraw(NamedTuple):
    """The arguments with which a plain call draws the image of a noise again.

    Attributes:
        form: The form that the pipeline takes as `latents=`: the noise itself, or the latents prepared from it.
        streams: The random streams that the call starts from.
        certain: Whether all random numbers of the call are known to be the same. Otherwise only drawing can tell.
    """

    form: Literal["noise", "prepared"]
    streams: RandomState
    certain: bool


def find_redraw(sampler, twin) -> Redraw | None:
    """Return the way to draw the images of a `PipelineSampler` again, or `None`. No denoiser runs.

    A call with `latents=` draws no noise. What else it draws comes from other places of the stream, unless it draws
    nothing before its steps and starts from where the noise left the stream, or its `prepare_latents` draws the same
    first.
    """
    space, noise, generator = sampler.space, sampler.base_noise, sampler.random_state.generator()
    target = sampler.prepare_on(twin, noise, generator)
    prepared, after = first_of(target), RandomState(generator, sampler.device)
    early = sampler.draws_early or not sampler.drew
    starts = [(sampler.start.own, sampler.random_state)] if early else [(after, after), (sampler.start.own,) * 2]
    if not space.takes_latents:  # then the pipeline uses `latents` unchanged
        return Redraw("prepared", starts[0][0], not early)
    forms: dict[Any, torch.Tensor] = {"noise": noise.to(prepared.dtype), "prepared": prepared}
    for stream, at_preparation in starts:
        for form, latents in forms.items():
            generator = at_preparation.generator()
            with contextlib.suppress(Exception):  # stock code that cannot take this form fails anywhere
                returned = space.on(twin, space.draw_noise, latents, generator=generator)
                if equal(returned, target):
                    same = after.equals(RandomState(generator, sampler.device))
                    return Redraw(form, stream, same and not sampler.draws_globally)
    return None


def equal(one: Any, other: Any) -> bool:
    """Return whether two return values of `prepare_latents` hold the same tensors."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other)


def check_redraw(sampler) -> None:
    """Raise `TypeError` for a call whose images a plain call with `latents=` would not draw again.

    Where the preparation of the latents leaves it open, the baseline is drawn in both ways.
    """
    redraw = sampler.redraw
    if redraw is not None and not redraw.certain:
        noise = sampler.base_noise
        drawn, again = sampler.images(noise), sampler.images_of_latents(sampler.to_latents(noise))
        redraw = redraw if torch.allclose(drawn, again, rtol=0, atol=CLOSE) else None
    if redraw is None:
        name = type(sampler.pipe).__name__
        raise TypeError(
            f"Expected a call that draws the same image from `latents`, but {name} draws other random numbers then, or "
            f"takes no such latents, and the noise that is found could not be handed back. {in_the_same_call(name)}"
        )


def in_the_same_call(name: str) -> str:
    """Return the remedy for pipelines that do not draw an image again from its latents."""
    return (
        f"Give it the hook, `class Ours(NoiseOptimizationMixin, {name})`, and call that with `method=...`: it "
        "generates the image in the same call."
    )
