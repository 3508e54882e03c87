"""Sampling the images of saved noises: the model of a result is loaded again."""

from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from .. import pipelines, shapes_world
from ..evaluation.looking import Looking
from ..pipelines.hook import optimize_noise
from ..pipelines.problem import NoiseProblem
from ..pipelines.results.noise_result import NoiseResult
from ..private_names import execution_device
from ..quiet import quiet_libraries
from .groups import CannotAnalyze, Group, embedded_name, pooled

TEXTS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")


def sample_latents(group: Group) -> tuple[Tensor, Tensor]:
    """Sample the latents of a group's initial and optimized noises, `(B, C, H, W)` each.

    Raises:
        CannotAnalyze: If the model is not named, cannot be loaded, or rejects the arguments of a result.
    """
    pipes: dict[tuple, Any] = {}
    drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
    for path, result in zip(group.paths, group.results, strict=True):
        try:
            key = model_key(result)
            if key not in pipes:
                pipes = {key: load_pipeline(result)}  # keep one in memory
            pipe = pipes[key]
            set_scheduler(pipe, result)
            for latents, noise in zip(drawn, (result.initial_noise, result.noise), strict=True):
                assert noise is not None
                latents.append(final_latents(pipe, result, noise))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise CannotAnalyze(
                f"Cannot sample the images of {path}: {reason}. Leave out --draw to get the other rows."
            ) from error
    return pooled(drawn[0]), pooled(drawn[1])


def model_key(result: NoiseResult) -> tuple:
    names = ("model", "revision", "pipeline", "dtype")
    return tuple(result.provenance.get(name) for name in names)


def load_pipeline(result: NoiseResult) -> Any:
    """Load the pipeline that a result names: an embedded model by name, others by Hub id or path."""
    found, name = result.provenance, embedded_name(result)
    if not found.get("model"):
        raise ValueError("Expected a result that names its model, but its pipeline had no name.")
    source = shapes_world.path(name) if name else found["model"]
    options = dict(shapes_world.MODELS[name].load) if name else {"revision": found.get("revision")}
    with quiet_libraries():
        pipe = pipeline_class(found["pipeline"]).from_pretrained(
            source, dtype=getattr(torch, found["dtype"]), **options
        )
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_class(name: str) -> Any:
    """Return a pipeline class of noiseopt or diffusers by name, else `DiffusionPipeline`."""
    found = getattr(pipelines, name, None) or getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else DiffusionPipeline


def set_scheduler(pipe: Any, result: NoiseResult) -> None:
    """Give the pipeline the scheduler of a result, which may differ from the one saved with the model."""
    settings = dict(result.provenance["scheduler"])
    cls = getattr(diffusers, str(settings.pop("class")), None)
    if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin):
        kept = {name: value for name, value in settings.items() if not name.startswith("_")}
        pipe.scheduler = cls.from_config({**pipe.scheduler.config, **kept})  # pyright: ignore[reportAttributeAccessIssue]


def final_latents(pipe: Any, result: NoiseResult, noise: Tensor) -> Tensor:
    """Sample noise of the shape of a result's, with its call's arguments: `(B, C, H, W)` on the CPU."""
    prompts = result.provenance["prompts"]
    if not any(prompts):
        raise ValueError(
            "Expected a result with prompts, but its call was given embeddings, which results do not store."
        )
    arguments = {name: repeated(value, len(prompts)) if name in TEXTS else value
                 for name, value in result.provenance["arguments"].items()}  # fmt: skip
    device, dtype = execution_device(pipe), getattr(torch, result.provenance["dtype"])
    ours = {"num_images_per_prompt": 1, "latents": noise.to(device, dtype), "generator": result.generator()}
    found: list[Tensor] = []

    def draw(problem: NoiseProblem) -> None:
        latents = problem.sampler.run(problem.noise, None, False, "latent")
        found.append(problem.space.unpack(problem.sampler.twin, latents).float().cpu())

    optimize_noise(pipe, prompts, Looking(draw), **{**arguments, **ours})
    return found[0]


def repeated(text: Any, count: int) -> Any:
    """Expand one text, or one per prompt, to one per image."""
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else list(text)
    return [each for each in texts for _ in range(count // len(texts))]
