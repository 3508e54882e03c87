"""The demo: the effect of a method on the images of an embedded model, as seen by a judge that is not optimized."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tqdm import tqdm

from . import shapes_world
from .callbacks import StepImages
from .callbacks.noise_callback import NoiseCallback
from .callbacks.noise_state import NoiseState
from .pipelines import NoiseOptimizer, NoiseResult, optimize_noise
from .quiet import quiet_libraries
from .story import Choice, Story

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}


def load_pipeline(name: str = "turbo") -> DiffusionPipeline:
    """Load an embedded pipeline in float32 on the CPU. Call "turbo" with the arguments `ONE_STEP`."""
    pipe = shapes_world.load(name)
    pipe.set_progress_bar_config(disable=None, leave=False)  # `None`: no bar when stderr is not a terminal
    return pipe


def seeded(seed: int, count: int) -> list[torch.Generator]:
    """Return one generator per image, so that no image depends on the batch size."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


class StepNoises(NoiseCallback):
    """Store the noise of every step, `(B, C, H, W)` each."""

    def __init__(self) -> None:
        self.noises: list[torch.Tensor] = []

    def on_step_end(self, state: NoiseState) -> None:
        self.noises.append(state.noise)


def optimize_and_judge(choice: Choice, prompts: Sequence[str], seed: int) -> Story:
    """Optimize the noise of each prompt on an embedded model, and judge the image of every step.

    Methods for single images get all prompts in one call; methods for sets get one call per prompt.
    """
    pipe, call = load_pipeline(choice.model.name), {**choice.model.call, "num_images_per_prompt": choice.count}
    groups = [list(prompts)] if choice.count == 1 else [[prompt] for prompt in prompts]
    with quiet_libraries():
        method, parts = choice.build(), []
        for group in tqdm(
            groups, unit="set", leave=False, dynamic_ncols=True, disable=None if len(groups) > 1 else True
        ):
            generators = seeded(seed, len(group) * choice.count)
            parts.append(optimize(pipe, group, method, {**call, "generator": generators}, choice.noise_sampler))
            seed += len(generators)
    every = [prompt for prompt in prompts for _ in range(choice.count)]
    images = torch.cat([images for _, images in parts], dim=1)
    verdicts = [shapes_world.judge(row, every) for row in images]
    return Story(choice, every, [result for result, _ in parts], images, verdicts)


def optimize(
    pipe, prompts: list[str], method: NoiseOptimizer, call: dict[str, Any], noise_sampler: Any = None
) -> tuple[NoiseResult, torch.Tensor]:
    """Optimize the noises of one call and return the result with the images of each step, `(steps, B, 3, 64, 64)`.

    A method that returns its last noise updates it once more after the last evaluation; the last row shows that noise.
    """
    frames, noises = StepImages(), StepNoises()
    result = optimize_noise(pipe, prompts, method, callbacks=[frames, noises], noise_sampler=noise_sampler, **call)
    previewed = result.reports.get("search", {}).get("previews", False)
    if method.returns == "last":
        noises.noises[-1] = result.noise
    elif not (method.previews or previewed) and len(frames.images) == len(noises.noises):
        return result, torch.stack([frames.images[step] for step in sorted(frames.images)])
    # the method did not evaluate finished images: sample them; embedded models take unit noise as latents
    again = {**call, "generator": result.generator(), "output_type": "pt"}
    return result, torch.stack([pipe(prompts, latents=noise, **again).images for noise in noises.noises])


def run_demo(choice: Choice, prompts: Sequence[str], seed: int, output: Path) -> Story:
    """Optimize, print a table, and write `before_after.png`, `trajectory.png` and the noises to a folder."""
    from . import plots  # the rest of this file works without matplotlib

    images = f"{choice.count} images of " * (choice.count > 1) + plural(len(prompts), "prompt")
    length = plural(choice.steps, "step") if choice.steps else choice.settings["budget"]
    print(f"Optimizing the noise of {images}, {length}, seed {seed}: {choice} ...", flush=True)
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
    return ["noise.safetensors"] if count == 1 else [f"noise_{number}.safetensors" for number in range(1, count + 1)]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def table(story: Story) -> str:
    """Format one row per prompt, and for sets their mean: the baseline and the returned images."""
    rows = [row_of(story, row) for row in range(len(story.sets))]
    head = ["prompt", "reward", "judge"]
    if not story.choice.single:
        head = ["prompt", "layout, pixels", *["mean reward"] * (len(rows[0]) == 4), f"right of {story.choice.count}"]
        rows.append(["mean", arrow(*(f"{mean_spread(story, end):.1f}" for end in (0, 1))), *[""] * (len(head) - 2)])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows])


def row_of(story: Story, row: int) -> list[str]:
    """Format the row of a prompt."""
    ends = (0, 1)
    cells = [story.prompts[story.sets[row].start], arrow(*(f"{story.value(row, end):.1f}" for end in ends))]
    if story.choice.single:
        return [*cells, arrow(*("right" if story.right(row, end) else "wrong" for end in ends))]
    rewards = [reward for end in ends if (reward := story.reward(row, end)) is not None]
    found = [arrow(*(f"{reward:.1f}" for reward in rewards))] if rewards else []
    return [*cells, *found, arrow(*(str(story.right(row, end)) for end in ends))]


def arrow(before: str, after: str) -> str:
    return f"{before.replace('nan', '–')} → {after.replace('nan', '–')}"


def summary(story: Story) -> str:
    """Summarize how many images are correct before and after, and explain the columns."""
    count, (before, after) = len(story.prompts), right_before_and_after(story)
    lines = [
        f"judge: {before} of {count} right → {after} of {count} right in {story.seconds:.0f} s",
        "The judge reads colors, shapes and positions off the pixels. It is not a model, and no method optimizes it.",
    ]
    if not story.choice.single:
        lines.append("layout: how far an object is from its mean position over the images of a prompt (RMS).")
    return "\n".join([*lines, *([story.choice.note] if story.choice.note else [])])


def right_before_and_after(story: Story) -> tuple[int, int]:
    """Count the correct images before and after."""
    before, after = (sum(story.right(row, end) for row in range(len(story.sets))) for end in (0, 1))
    return before, after


def mean_spread(story: Story, end: int) -> float:
    """Return the mean `layout_spread` in pixels of the sets before (`end=0`) or after (`end=1`); NaN if undefined."""
    found = [value for row in range(len(story.sets)) if math.isfinite(value := story.value(row, end))]
    return sum(found) / len(found) if found else math.nan
