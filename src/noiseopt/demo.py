"""The demo: what ReNO changes in the pictures of an embedded model, told by a judge that no method can please."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from . import shapes_world
from .callbacks import StepImages
from .pipelines import NoiseResult, ReNO, optimize_noise
from .quiet import quiet_libraries
from .shapes_world.judge import Verdict

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}


def first_of_each(prompts: Iterable[str], counts: dict[str, int]) -> list[str]:
    """The first `counts[category]` prompts of each category of the shapes world, category by category."""
    groups: dict[str, list[str]] = {name: [] for name in counts}
    for prompt in prompts:
        groups.get(shapes_world.category(prompt), []).append(prompt)
    return [prompt for name, count in counts.items() for prompt in groups[name][:count]]


# The first of a list that is shuffled once for all: not chosen by how well they come out.
DEFAULT_PROMPTS = first_of_each(shapes_world.VALIDATION_PROMPTS, {"position": 4, "binding": 2, "counting": 2})


def load_pipeline(name: str = "turbo") -> DiffusionPipeline:
    """An embedded pipeline of the shapes world, in float32 on the CPU. "turbo" takes the arguments `ONE_STEP`."""
    with quiet_libraries():
        pipe = DiffusionPipeline.from_pretrained(shapes_world.path(name), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=None, leave=False)  # `None`: a bar for people, nothing in a log file
    return pipe


def seeded(seed: int, count: int) -> list[torch.Generator]:
    """One generator for each image, so that no image depends on how many are drawn together."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


@dataclasses.dataclass(frozen=True, eq=False)
class Story:
    """What happened to `B` prompts, step by step.

    Attributes:
        prompts: `B` prompts.
        result: What `optimize_noise` returned.
        images: `(steps, B, 3, 64, 64)` in [0, 1].
        verdicts: What the judge says of each image, by step and prompt.
    """

    prompts: Sequence[str]
    result: NoiseResult
    images: torch.Tensor
    verdicts: list[list[Verdict]]

    @property
    def rewards(self) -> torch.Tensor:
        """`(steps, B)`, the weighted sum of the rewards, higher is better."""
        return -self.result.losses

    def best(self, sample: int) -> int:
        """The step whose image is returned."""
        return int(self.result.best_step[sample])

    def first_right(self, sample: int) -> int | None:
        """The first step whose image the judge finds right, if any."""
        return next((step for step, row in enumerate(self.verdicts) if row[sample].correct), None)

    def ends(self, sample: int) -> tuple[int, int]:
        """The steps before and after: the plain image, and the one that is returned."""
        return 0, self.best(sample)


def optimize_and_judge(prompts: Sequence[str], seed: int, steps: int) -> Story:
    """Optimise the noise of each prompt with ReNO on the embedded one-step model, and judge the image of every step."""
    pipe, frames = load_pipeline(), StepImages()
    with quiet_libraries():
        method = ReNO(rewards=shapes_world.path("clip"), steps=steps)
        generators = seeded(seed, len(prompts))
        result = optimize_noise(pipe, list(prompts), method, callbacks=frames, generator=generators, **ONE_STEP)
    images = torch.stack([frames.images[step] for step in sorted(frames.images)])
    return Story(prompts, result, images, [shapes_world.judge(row, prompts) for row in images])


def run_demo(prompts: Sequence[str], seed: int, steps: int, output: Path) -> Story:
    """Optimise, print a table, and write `before_after.png`, `trajectory.png` and `noise.safetensors` into a folder."""
    from . import plots  # here, so that the rest of this file needs no matplotlib

    print(f"Optimising the noise of {plural(len(prompts), 'prompt')}, {plural(steps, 'step')}, seed {seed} ...")
    story = optimize_and_judge(prompts, seed, steps)
    print("\n" + table(story) + "\n\n" + summary(story) + "\n")
    for name, write in {
        "before_after.png": lambda path: plots.draw_before_after(story, path),
        "trajectory.png": lambda path: plots.draw_trajectory(story, path),
        "noise.safetensors": story.result.save,
    }.items():
        write(output / name)
        print(f"wrote {output / name}")
    return story


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def table(story: Story) -> str:
    """Two lines for each prompt: the plain image and the one that is returned."""
    rows = [("prompt", "reward", "judge")]
    for sample, prompt in enumerate(story.prompts):
        for label, step in zip((prompt, ""), story.ends(sample), strict=True):
            reward = f"{'' if label else '→ '}{story.rewards[step, sample]:.1f}"
            rows.append((label, reward, in_words(story.verdicts[step][sample])))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{prompt:<{first}}  {reward:>{second}}  {verdict}" for prompt, reward, verdict in rows)


def in_words(verdict: Verdict) -> str:
    return "right" if verdict.correct else f"wrong: {verdict.found}"


def summary(story: Story) -> str:
    """How many images the judge finds right, before and after."""
    count = len(story.prompts)
    before, after = (
        sum(story.verdicts[story.ends(sample)[end]][sample].correct for sample in range(count)) for end in (0, 1)
    )
    seconds = story.result.provenance["seconds"]
    return (
        f"judge: {before} of {count} right → {after} of {count} right in {seconds:.0f} s\n"
        "The judge reads colors, shapes and places off the pixels. It is no model, and nothing here optimises it."
    )
