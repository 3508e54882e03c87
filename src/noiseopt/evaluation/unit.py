"""One unit of an evaluation: a method draws the images of one prompt; they are measured, written and never redone."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from .. import shapes_world
from ..pipelines.baselines.plain_sampling import PlainSampling
from ..pipelines.hook import optimize_noise
from ..pipelines.method import NoiseOptimizer
from ..pipelines.results.atomic_write import atomic_write as write_whole
from ..pipelines.results.noise_result import NoiseResult
from ..pipelines.searches.best_of_n import BestOfN
from .instruments import Instruments, noise_measures, set_measures, verdicts
from .measure import Cost, measured
from .plan import Contender, ModelChoice, Plan

SIDE = shapes_world.SIZE


@dataclasses.dataclass(eq=False)
class Drawing:
    """The images of one prompt, by the stock pipeline from the noise that a method found.

    Attributes:
        images: `(B, 3, H, W)` in [0, 1], float32.
        result: The noise, and how it was found.
        cost: Of finding the noise and drawing the images.
    """

    images: torch.Tensor
    result: NoiseResult
    cost: Cost


@dataclasses.dataclass(eq=False)
class Studio:
    """A loaded model with the instruments of a plan."""

    plan: Plan
    model: ModelChoice
    pipe: Any
    instruments: Instruments
    device: torch.device

    def method(self, contender: Contender, best_of: int | None) -> NoiseOptimizer:
        """What chooses the noise; `best_of` is N for a control."""
        if contender.method is None:
            return PlainSampling()
        if contender.control:
            return BestOfN(rewards=self.instruments.rewards, steps=best_of or 1)
        embedded_on = self.device if self.model.embedded else None
        return contender.method.build(self.instruments.rewards, embedded_on)

    def generators(self, index: int) -> list[torch.Generator]:
        """One for each image of a prompt; on the CPU, to draw the same noise for every device."""
        return [torch.Generator().manual_seed(self.plan.seed(index, image)) for image in range(self.plan.seeds)]

    def steered(self, contender: Contender, index: int) -> dict[str, Any]:
        """The arguments of a pipeline's call for a contender that steers its steps, with random numbers of its own."""
        seeds = [2**40 + self.plan.seed(index, image) for image in range(self.plan.seeds)]
        callback = contender.method.callback(seeds) if contender.method and not contender.control else None
        if callback is None:
            return {}
        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": callback.tensor_inputs}

    def check_steering(self, contender: Contender) -> None:
        """Draw a first image with a contender that steers, if it does. Raises what its callback has against that."""
        if steered := self.steered(contender, 0):
            steered["callback_on_step_end"].check(self.pipe)
            self.draw(PlainSampling(), 0, steered=steered)

    def draw(
        self, method: NoiseOptimizer, index: int, callbacks: Any = None, steered: Mapping[str, Any] | None = None
    ) -> Drawing:
        """Find the noise of a prompt's images, and draw them with the stock pipeline.

        No image is taken from a method: what is measured is what its noise alone makes of the unchanged model, or what
        `steered` makes of plain noise.
        """
        prompt = self.plan.prompts.prompts[index].text
        call = {**self.model.call, "num_images_per_prompt": self.plan.seeds}
        with measured(self.pipe, self.device) as cost:
            result = optimize_noise(
                self.pipe, prompt, method, callbacks=callbacks, generator=self.generators(index), **call
            )
            found = {"latents": result.latents, "generator": result.generator(), "output_type": "pt", **(steered or {})}
            images = self.pipe(prompt, **call, **found).images.float()
        return Drawing(images, result, cost)

    def warm_up(self) -> None:
        """Let every contender take its first passes, which are slower than the others and take more memory."""
        for contender in self.plan.contenders:
            steered = self.steered(contender, 0)
            self.draw(self.method(contender, 2), 0, callbacks=lambda state: state.step < 1, steered=steered)

    def measure(self, contender: Contender, index: int, best_of: int | None) -> "Unit":
        """One unit, computed."""
        prompt = self.plan.prompts.prompts[index]
        drawing = self.draw(self.method(contender, best_of), index, steered=self.steered(contender, index))
        images, cost, judged = drawing.images, drawing.cost, self.judged(drawing.images)
        features = self.instruments.embed(images)
        references = self.instruments.renders(prompt.text) if judged else None
        numbers = {
            "model": self.model.name,
            "method": contender.key,
            "index": index,
            "prompt": prompt.text,
            "category": self.plan.category(index),
            "seeds": [self.plan.seed(index, image) for image in range(self.plan.seeds)],
            "judge": verdicts(images, prompt.text) if judged else None,
            "rewards": self.instruments.scores(images, prompt.text),
            "set": set_measures(images, features, references, prompt.text if judged else None),
            "noise": noise_measures(drawing.result),
            "noise shape": list(drawing.result.noise.shape),
            "evaluations": len(drawing.result.losses),
            "cost": dataclasses.asdict(cost),
        }
        tensors = {"noise": drawing.result.noise, **({} if features is None else {"features": features})}
        return Unit(numbers, tensors, images)

    def judged(self, images: torch.Tensor) -> bool:
        """Whether the judge can read these images: those of the shapes world's size, for its prompts."""
        return images.shape[-2:] == (SIDE, SIDE) and self.plan.of_shapes_world


@dataclasses.dataclass(eq=False)
class Unit:
    """What was measured of one model, method and prompt: plain values, tensors and images."""

    numbers: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    images: torch.Tensor

    def save(self, path: Path) -> None:
        """Write `path` (JSON) and beside it the tensors and images; `path` is there only once all of it is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for image, pixels in enumerate(self.images):
            write_whole(image_path(path, image), picture(pixels).save)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        write_whole(path.with_suffix(".safetensors"), lambda part: save_file(tensors, part))
        write_json(path, self.numbers)


def image_path(path: Path, image: int) -> Path:
    """Where one image of the unit at `path` is."""
    return path.with_name(f"{path.stem}-{image}.png")


def picture(pixels: torch.Tensor) -> Image.Image:
    """`(3, H, W)` in [0, 1] as an image."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def write_json(path: Path, values: Any) -> None:
    """JSON in which NaN is null, as the format has no NaN."""
    text = json.dumps(without_nan(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def without_nan(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: without_nan(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
