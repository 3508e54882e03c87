"""The demo: the effect of a method on the images of an embedded model, as seen by a judge that is not optimized."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from . import shapes_world
from .arguments import progress_line
from .callbacks.noise_state import NoiseState
from .callbacks.progress import ProgressBar
from .evaluation.embedded_diversity import tower
from .pipelines import NoiseResult, optimize_noise
from .quiet import quiet_libraries
from .shapes_world.judge import Verdict
from .story import ENDS, Choice, Story, arrow, decimal, diversity, plural

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}


def load_pipeline(name: str = "turbo") -> DiffusionPipeline:
    """Load an embedded pipeline in float32 on the CPU. Call "turbo" with the arguments `ONE_STEP`."""
    pipe = shapes_world.load(name)
    pipe.set_progress_bar_config(disable=None, leave=False)  # `None`: no bar when stderr is not a terminal
    return pipe


def seeded(seed: int, count: int) -> list[torch.Generator]:
    """Return one generator per image, so that no image depends on the batch size."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """The images `(B, 3, H, W)` of one step, the judge's verdicts, and for sets the features `(B, D)`."""

    images: Tensor
    verdicts: list[Verdict]
    features: Tensor | None


class Recorder(ProgressBar):
    """The frames of each run, with one tick of the demo's bar for each. Images that a method previews are drawn.

    Args:
        choice: The method and the model.
        runs: The number of calls.
        bar: The bar over all of them.
    """

    def __init__(self, choice: Choice, runs: int, bar: tqdm) -> None:
        self.choice, self.left, self.bar = choice, runs, bar
        self.pipe: Any = load_pipeline(choice.model.name)
        self.method = choice.build()
        self.pipe.set_progress_bar_config(disable=True)
        self.ruler = None if choice.ruler is None else tower(choice.ruler, torch.device("cpu"))
        self.call = {**choice.model.call, "num_images_per_prompt": choice.count}
        self.finished: list[float] = []  # the diversity of each set that is done
        bar.reset()
        bar.bar_format = None

    def record(self, prompts: list[str], generators: list[torch.Generator]) -> tuple[NoiseResult, list[Frame]]:
        """Optimize the noises of one call."""
        self.prompts, noise_sampler = prompts, self.choice.noise_sampler
        own = {"callbacks": self, "noise_sampler": noise_sampler, "generator": generators}
        result = optimize_noise(self.pipe, prompts, self.method, **own, **self.call)
        if not self.choice.keeps_best:  # the noise moved once more after the last evaluation
            self.see(self.drawn(result.noise))
            self.tick()
        if self.ruler is not None:
            self.finished.append(self.diversity())
        self.bar.total = self.bar.n + self.left * len(self.frames)  # it may have ended early
        return result, self.frames

    def drawn(self, noise: Tensor) -> Tensor:
        """Return the images of a noise; embedded models take unit noise as latents."""
        return self.pipe(self.prompts, latents=noise, output_type="pt", **self.call).images

    def see(self, images: Tensor) -> None:
        """Add a frame."""
        images = images.detach().float().cpu()
        with torch.no_grad():
            features = None if self.ruler is None else self.ruler(images)
        prompts = [prompt for prompt in self.prompts for _ in range(self.choice.count)]
        self.frames.append(Frame(images, shapes_world.judge(images, prompts), features))

    def on_run_start(self, state: NoiseState) -> None:
        self.frames, self.state, self.begin = [], state, self.bar.n
        self.left -= 1
        self.tick(0)
        self.bar.refresh()

    def on_step_end(self, state: NoiseState) -> None:
        self.see(self.drawn(state.noise) if state.images is None else state.images)
        self.tick()

    def on_run_end(self, state: NoiseState) -> None:
        pass

    def tick(self, frames: int = 1) -> None:
        """Advance the bar; further runs are taken to have as many frames as this one."""
        planned = self.state.steps + self.method.closing + (not self.choice.keeps_best)
        self.bar.total = self.begin + max(planned, len(self.frames)) + self.left * planned
        self.bar.set_description(self.choice.name, refresh=False)
        if self.frames:
            self.bar.set_postfix_str(self.outcome(), refresh=False)
        self.bar.update(frames)

    @property
    def returned(self) -> list[int]:
        """The frame of each image that is returned if the run ends now."""
        if self.choice.keeps_best:
            return self.state.best.step.tolist()
        return [len(self.frames) - 1] * len(self.frames[-1].images)

    def outcome(self) -> str:
        """Return the outcome so far, in the method's unit."""
        if self.ruler is not None:
            found = [*self.finished, self.diversity()]
            return f"diversity {decimal(sum(found) / len(found), 3)}"
        if self.choice.measure == "P(yes)":
            return f"P(yes) {decimal(-float(self.state.best.loss.mean()), 2)}"
        right = [self.frames[step].verdicts[image].correct for image, step in enumerate(self.returned)]
        return f"right {sum(right)} of {len(right)}"

    def diversity(self) -> float:
        """Return the diversity of the set that is returned if the run ends now."""
        frames = [self.frames[step].features for step in self.returned]
        return float(diversity(torch.stack([features[image] for image, features in enumerate(frames)])))


def optimize_and_judge(choice: Choice, prompts: Sequence[str], seed: int, bar: tqdm | None = None) -> Story:
    """Optimize the noise of each prompt on an embedded model, and judge the image of every step.

    Methods for single images get all prompts in one call; methods for sets get one call per prompt.

    Args:
        choice: The method and the model.
        prompts: Prompts of the shapes world.
        seed: The seed of the first image; each further one has the next.
        bar: The progress bar, which is closed at the end; by default one of its own.
    """
    started, groups = time.perf_counter(), [list(prompts)] if choice.count == 1 else [[prompt] for prompt in prompts]
    results, runs = [], []
    with quiet_libraries(), progress_line() if bar is None else bar as line:
        recorder = Recorder(choice, len(groups), line)
        for group in groups:
            generators = seeded(seed, len(group) * choice.count)
            result, frames = recorder.record(group, generators)
            results.append(result)
            runs.append(frames)
            seed += len(generators)
    seconds = time.perf_counter() - started
    every = [prompt for prompt in prompts for _ in range(choice.count)]
    # a run may end early: its last frame stays
    steps = [[frames[min(step, len(frames) - 1)] for frames in runs] for step in range(max(map(len, runs)))]
    images = torch.stack([torch.cat([frame.images for frame in row]) for row in steps])
    verdicts = [[verdict for frame in row for verdict in frame.verdicts] for row in steps]
    features = [
        torch.cat([frame.features for frame in row if frame.features is not None]) for row in steps if choice.ruler
    ]
    return Story(choice, every, results, images, verdicts, torch.stack(features) if features else None, seconds)


def run_demo(choice: Choice, prompts: Sequence[str], seed: int, output: Path, bar: tqdm | None = None) -> Story:
    """Optimize, print a table, and write `before_after.png`, `trajectory.png` and the noises to a folder."""
    from . import plots  # the rest of this file works without matplotlib

    with tqdm.external_write_mode():
        print(plan(choice, len(prompts), seed), flush=True)
    story = optimize_and_judge(choice, prompts, seed, bar)
    print("\n" + table(story) + "\n\n" + summary(story))
    noises = noise_files(len(story.results))
    write: dict[str, Callable[[Path], object]] = {
        "before_after.png": lambda path: plots.draw_before_after(story, path),
        "trajectory.png": lambda path: plots.draw_trajectory(story, path),
        **{name: result.save for name, result in zip(noises, story.results, strict=True)},
    }
    for name, save in write.items():
        save(output / name)
    saved = noises[0] if len(noises) == 1 else f"{noises[0]} to {noises[-1]}"
    print(f"{output}: before_after.png, trajectory.png, {saved}. Next: {following(choice)}")
    return story


def plan(choice: Choice, prompts: int, seed: int) -> str:
    """Return what the demo will do, and how long that will take."""
    images = plural(prompts, "prompt") if choice.count == 1 else f"{choice.count} images of {plural(prompts, 'prompt')}"
    return f"{choice}: {images}, seed {seed}, {choice.length(prompts)}."


def following(choice: Choice) -> str:
    """Return the command to try next."""
    if name := choice.recipe.following:
        return f"noiseopt demo --method {name}"
    return f"noiseopt generate --model {choice.model.name} --prompts validation --limit 8 --method {choice.method}"


def noise_files(count: int) -> list[str]:
    return ["noise.safetensors"] if count == 1 else [f"noise_{number}.safetensors" for number in range(1, count + 1)]


def table(story: Story) -> str:
    """Format one row per prompt: the baseline and the returned images."""
    head, *rows = [["prompt", *columns(story)], *(row_of(story, row) for row in range(len(story.sets)))]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows])


def columns(story: Story) -> list[str]:
    if story.choice.single:
        return [story.choice.measure, "judge"]
    return ["diversity", f"Vendi of {story.choice.count}", "layout, px", f"right of {story.choice.count}"]


def row_of(story: Story, row: int) -> list[str]:
    """Format the row of a prompt."""
    cells = [story.prompts[story.sets[row].start], story.change(story.value, story.digits, row)]
    right = [story.right(row, end) for end in ENDS]
    if story.choice.single:
        return [*cells, arrow(*("right" if each else "wrong" for each in right))]
    return [*cells, story.change(story.vendi, 2, row), story.change(story.layout, 1, row), arrow(*map(str, right))]


def summary(story: Story) -> str:
    """Summarize the effect, and explain the columns."""
    seconds = f"in {story.seconds:.0f} s"
    judge = "right: by a judge that reads colors, shapes and positions off the pixels, and that no method optimizes."
    if story.choice.ruler is None:
        lines = [f"{story.headline}, {seconds}", judge]
    else:
        measures = f"Vendi {story.change(story.vendi, 2)}, layout {story.change(story.layout, 1)} px"
        kind = "optimized" if story.choice.ruler in story.choice.instruments else "held-out"
        lines = [
            f"{story.headline}, {measures}, {seconds}",
            f"diversity: 1 − the mean cosine in {kind} features ({story.choice.ruler}); Vendi: as a number of images; "
            "layout: RMS distance of an object from its mean position.",
            judge,
        ]
    return "\n".join([*lines, *([story.choice.recipe.note] if story.choice.recipe.note else [])])
