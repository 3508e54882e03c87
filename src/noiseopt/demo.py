"""The demo: what a method changes in the pictures of an embedded model, told by a judge that no method can please."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from . import shapes_world
from .callbacks import StepImages
from .callbacks.noise_callback import NoiseCallback
from .callbacks.noise_state import NoiseState
from .evaluation.embedded_diversity import embedded_diversity, towers_of
from .evaluation.metrics import layout_spread
from .evaluation.plan import MethodChoice
from .pipelines import NoiseOptimizer, NoiseResult, list_methods, optimize_noise
from .pipelines.registry import METHODS
from .quiet import quiet_libraries
from .shapes_world.embedded import EmbeddedModel
from .shapes_world.judge import Verdict

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}
SET = 4  # images of a prompt, for methods that look at how they differ
STEPS, STEPS_OF_CHAINS = 50, 20  # what eight prompts take well under a minute for, on two cores


def first_of_each(prompts: Iterable[str], counts: dict[str, int]) -> list[str]:
    """The first `counts[category]` prompts of each category of the shapes world, category by category."""
    groups: dict[str, list[str]] = {name: [] for name in counts}
    for prompt in prompts:
        groups.get(shapes_world.category(prompt), []).append(prompt)
    return [prompt for name, count in counts.items() for prompt in groups[name][:count]]


SCORE_RANGE = (0.0, 16.0)  # where the embedded reward puts wrong and right pictures, for methods that must know
# The first of a list that is shuffled once for all: not chosen by how well they come out.
DEFAULT_PROMPTS = first_of_each(shapes_world.VALIDATION_PROMPTS, {"position": 4, "binding": 2, "counting": 2})


def load_pipeline(name: str = "turbo") -> DiffusionPipeline:
    """An embedded pipeline of the shapes world, in float32 on the CPU. "turbo" takes the arguments `ONE_STEP`."""
    folder, parts = shapes_world.path(name), shapes_world.MODELS[name].load
    with quiet_libraries():
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=None, leave=False)  # `None`: a bar for people, nothing in a log file
    return pipe


def seeded(seed: int, count: int) -> list[torch.Generator]:
    """One generator for each image, so that no image depends on how many are drawn together."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method by its name in `list_methods()`, on an embedded model.

    Attributes:
        method: A name of the registry.
        model: An embedded pipeline.
        steps: Evaluations of each noise; by default the method's own number, but no more than suits the model.
    """

    method: str
    model: EmbeddedModel
    steps: int

    @classmethod
    def of(cls, method: str = "reno", model: str = "turbo", steps: int | None = None) -> "Choice":
        """Raises `ValueError` for unknown names, and for a method that has no number of steps to set."""
        pipelines = [name for name, known in shapes_world.MODELS.items() if known.is_pipeline]
        methods = [name for name in list_methods() if name in METHODS]
        for what, name, names in (("method", method, methods), ("model", model, pipelines)):
            if name not in names:
                raise ValueError(f"Expected a {what} out of {', '.join(names)}, but got {name!r}.")
        embedded = shapes_world.MODELS[model]
        limit = STEPS if embedded.call["num_inference_steps"] == 1 else STEPS_OF_CHAINS
        return cls(method, embedded, steps or min(METHODS[method].steps, limit))

    @property
    def takes_rewards(self) -> bool:
        return MethodChoice.parse(self.method).takes_rewards

    @property
    def diversity(self) -> Any:
        """What a method of sets is to raise, or `None`."""
        return MethodChoice.parse(self.method).diversity

    @property
    def single(self) -> bool:
        """Whether each image is for itself and its reward is to rise: not so for a method that makes images differ."""
        return self.takes_rewards and self.diversity is None

    @property
    def count(self) -> int:
        """Images of each prompt: one, or a set."""
        return 1 if self.single else SET

    @property
    def prompts(self) -> list[str]:
        """What is drawn if nothing else is asked for."""
        return DEFAULT_PROMPTS if self.count == 1 else DEFAULT_PROMPTS[::2]

    @property
    def keeps_best(self) -> bool:
        """Whether the best step is returned, not the last."""
        return METHODS[self.method].returns == "best"

    def build(self) -> NoiseOptimizer:
        """The method, on the embedded reward and tower if it takes any."""
        settings: dict[str, Any] = {"steps": self.steps}
        if self.takes_rewards:
            settings["rewards"] = shapes_world.path("clip")
        if hasattr(METHODS[self.method], "score_range"):
            settings["score_range"] = SCORE_RANGE
        if self.diversity is not None:
            settings["diversity"] = embedded_diversity(self.diversity)
        return METHODS[self.method](**settings)

    @property
    def instruments(self) -> list[str]:
        """The embedded models that the method looks through: a reward, features."""
        names = {"clip"} if self.takes_rewards else set()
        names |= set() if self.diversity is None else towers_of(self.diversity)
        return [name for name in shapes_world.MODELS if name in names]

    def weights(self) -> list[str]:
        """The folders of all weights that it needs. Raises `FileNotFoundError` for what cannot be had."""
        return [shapes_world.path(name) for name in (self.model.name, *self.instruments)]

    def __str__(self) -> str:
        return f"{METHODS[self.method].__name__} on {self.model.name}, the {self.model.title}"


class StepNoises(NoiseCallback):
    """Keep the noise of every step, `(B, C, H, W)` each."""

    def __init__(self) -> None:
        self.noises: list[torch.Tensor] = []

    def on_step_end(self, state: NoiseState) -> None:
        self.noises.append(state.noise)


@dataclasses.dataclass(frozen=True, eq=False)
class Story:
    """What happened to `B` noises, step by step.

    Attributes:
        choice: The method and the model.
        prompts: The prompt of each noise; those of a set follow one another.
        results: What `optimize_noise` returned: of all prompts, or of each set.
        images: `(steps, B, 3, 64, 64)` in [0, 1].
        verdicts: What the judge says of each image, by step and sample.
    """

    choice: Choice
    prompts: Sequence[str]
    results: Sequence[NoiseResult]
    images: torch.Tensor
    verdicts: list[list[Verdict]]

    @property
    def values(self) -> torch.Tensor:
        """`(steps, B)`: the weighted sum of the rewards, which is to rise, or the loss of a set, which is to fall."""
        return -self.direction * torch.cat([result.losses for result in self.results], dim=1)

    @property
    def direction(self) -> int:
        """1 if higher values are better, else −1."""
        return 1 if self.choice.single else -1

    @property
    def measure(self) -> str:
        """What `values` are called."""
        return "reward" if self.choice.single else "loss"

    def value(self, step: int, sample: int) -> str:
        """One of `values` in as many digits as its kind needs."""
        return f"{self.values[step, sample]:.{1 if self.choice.single else 3}f}"

    @property
    def seconds(self) -> float:
        return sum(result.provenance["seconds"] for result in self.results)

    def best(self, sample: int) -> int:
        """The step whose image is returned."""
        return int(torch.cat([result.best_step for result in self.results])[sample])

    def first_right(self, sample: int) -> int | None:
        """The first step whose image the judge finds right, if any."""
        return next((step for step, row in enumerate(self.verdicts) if row[sample].correct), None)

    def ends(self, sample: int) -> tuple[int, int]:
        """The steps before and after: the plain image, and the one that is returned."""
        return 0, self.best(sample)

    def end_images(self, end: int) -> torch.Tensor:
        """`(B, 3, 64, 64)`: all images before (0) or after (1)."""
        return torch.stack([self.images[self.ends(sample)[end], sample] for sample in range(len(self.prompts))])


def optimize_and_judge(choice: Choice, prompts: Sequence[str], seed: int) -> Story:
    """Optimise the noise of each prompt on an embedded model, and judge the image of every step.

    A method of single images takes all prompts in one call; one that looks at sets takes one prompt in each.
    """
    pipe, call = load_pipeline(choice.model.name), {**choice.model.call, "num_images_per_prompt": choice.count}
    groups = [list(prompts)] if choice.count == 1 else [[prompt] for prompt in prompts]
    with quiet_libraries():
        method, parts = choice.build(), []
        for group in groups:
            generators = seeded(seed, len(group) * choice.count)
            parts.append(optimize(pipe, group, method, {**call, "generator": generators}))
            seed += len(generators)
    every = [prompt for prompt in prompts for _ in range(choice.count)]
    images = torch.cat([images for _, images in parts], dim=1)
    verdicts = [shapes_world.judge(row, every) for row in images]
    return Story(choice, every, [result for result, _ in parts], images, verdicts)


def optimize(
    pipe, prompts: list[str], method: NoiseOptimizer, call: dict[str, Any]
) -> tuple[NoiseResult, torch.Tensor]:
    """One call of a pipeline for `B` images: its result, and `(steps, B, 3, 64, 64)` what each step's noise draws.

    A method that returns its last noise moves it once more after the last step: that is what the final row draws.
    """
    frames, noises = StepImages(), StepNoises()
    result = optimize_noise(pipe, prompts, method, callbacks=[frames, noises], **call)
    if method.returns == "last":
        noises.noises[-1] = result.noise
    elif not method.preview and len(frames.images) == len(noises.noises):
        return result, torch.stack([frames.images[step] for step in sorted(frames.images)])
    # the method looked at something else than the finished images; embedded models take unit noise as their latents
    again = {**call, "generator": result.generator(), "output_type": "pt"}
    return result, torch.stack([pipe(prompts, latents=noise, **again).images for noise in noises.noises])


def run_demo(choice: Choice, prompts: Sequence[str], seed: int, output: Path) -> Story:
    """Optimise, print a table, and write `before_after.png`, `trajectory.png` and the noises into a folder."""
    from . import plots  # here, so that the rest of this file needs no matplotlib

    images = f"{choice.count} images of " * (choice.count > 1) + plural(len(prompts), "prompt")
    print(f"Optimising the noise of {images}, {plural(choice.steps, 'step')}, seed {seed}: {choice} ...")
    story = optimize_and_judge(choice, prompts, seed)
    print("\n" + table(story) + "\n\n" + summary(story) + "\n")
    write = {"before_after.png": lambda path: plots.draw_before_after(story, path)}
    write["trajectory.png"] = lambda path: plots.draw_trajectory(story, path)
    for name, result in zip(noise_files(len(story.results)), story.results, strict=True):
        write[name] = result.save
    for name, save in write.items():
        save(output / name)
        print(f"wrote {output / name}")
    return story


def noise_files(count: int) -> list[str]:
    """The names of so many results."""
    return ["noise.safetensors"] if count == 1 else [f"noise_{number}.safetensors" for number in range(1, count + 1)]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def table(story: Story) -> str:
    """Two lines for each prompt: the plain image and the one that is returned."""
    rows = [("prompt", story.measure, "judge")]
    for sample, prompt in enumerate(story.prompts):
        for label, step in zip((prompt, ""), story.ends(sample), strict=True):
            value = f"{'' if label else '→ '}{story.value(step, sample)}"
            rows.append((label, value, in_words(story.verdicts[step][sample])))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{prompt:<{first}}  {value:>{second}}  {verdict}" for prompt, value, verdict in rows)


def in_words(verdict: Verdict) -> str:
    return "right" if verdict.correct else f"wrong: {verdict.found}"


def summary(story: Story) -> str:
    """How many images the judge finds right, before and after; of sets also how far their layouts differ."""
    count, (before, after) = len(story.prompts), right_before_and_after(story)
    lines = [
        f"judge: {before} of {count} right → {after} of {count} right in {story.seconds:.0f} s",
        "The judge reads colors, shapes and places off the pixels. It is no model, and nothing here optimises it.",
    ]
    if story.choice.count > 1:
        apart = " → ".join(f"{mean_spread(story, end):.1f}" for end in (0, 1))
        lines.append(f"layout: the same objects are {apart} pixels from their mean place in the images of a prompt")
    return "\n".join(lines)


def right_before_and_after(story: Story) -> tuple[int, int]:
    """How many images the judge finds right."""
    ends = [story.ends(sample) for sample in range(len(story.prompts))]
    before, after = (sum(story.verdicts[pair[end]][i].correct for i, pair in enumerate(ends)) for end in (0, 1))
    return before, after


def mean_spread(story: Story, end: int) -> float:
    """The mean `layout_spread` of the sets before (0) or after (1), in pixels; NaN if no place can be compared."""
    sets = zip(story.prompts[:: story.choice.count], story.end_images(end).split(story.choice.count), strict=True)
    found = [spread for prompt, images in sets if math.isfinite(spread := layout_spread(images, prompt))]
    return sum(found) / len(found) if found else math.nan
