"""Generation: images of each prompt before and after the optimization of its noise, in a folder; resumable."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from . import shapes_world
from .callbacks.early_stopping import TimeBudget
from .evaluation.evaluate import check_call, load_pipeline, one_line
from .evaluation.folder import CannotEvaluate, locked, read_object
from .evaluation.instruments import load_reward
from .evaluation.plan import (
    MethodChoice,
    ModelChoice,
    SteeringChoice,
    check_device,
    check_reward,
)
from .evaluation.prompt_sets import PromptSet
from .evaluation.unit import write_json
from .gallery import page
from .pipelines.baselines.plain_sampling import PlainSampling
from .pipelines.hook import optimize_noise
from .pipelines.method import NoiseOptimizer
from .pipelines.registry import METHODS
from .pipelines.result_folder import prompt_slug
from .pipelines.results.atomic_write import atomic_write
from .pipelines.results.noise_result import NoiseResult
from .pipelines.results.settings_diff import settings_diff
from .quiet import quiet_libraries
from .shown_text import shown

SECONDS_BETWEEN_REPORTS = 10.0
OTHERS = "Choose another --output, or delete that folder."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A request: models, prompts and settings.

    Attributes:
        model, method: The model with the arguments of its call, and the method.
        prompts: The prompts in order.
        rewards: Name and weight of each optimized reward.
        images: Images of each prompt, generated in one call as a set.
        seed: The seed of the first image of a prompt; each next one has the next seed.
        budget: Seconds for the optimization of each prompt; `None` for all steps.
        device, dtype: Of the models; `None` for the default.
    """

    model: ModelChoice
    method: MethodChoice
    prompts: PromptSet
    rewards: tuple[tuple[str, float], ...] = ()
    images: int = 1
    seed: int = 0
    budget: float | None = None
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        name = self.method.name
        if isinstance(self.method, SteeringChoice):
            raise ValueError(
                f"Expected a method that optimizes noise, but got {name!r}, which steers the sampling. `noiseopt "
                "evaluate` compares what steers it."
            )
        if "noise_sampler" in self.model.call:
            raise ValueError(
                f"Expected `--call` without noise_sampler, but got {self.model.call['noise_sampler']!r}. Pass it "
                "as a setting of the method."
            )
        if self.rewards and not self.method.takes_rewards:
            raise ValueError(
                f"Expected no `--reward` for {name}, which takes none, but got {self.rewards[0][0]!r}. Leave it out."
            )
        if not self.rewards and requires_rewards(self.method):
            raise ValueError(
                f"Expected a `--reward` for {name} to optimize, but got none. `noiseopt rewards` lists them."
            )
        weights = [weight for _, weight in self.rewards]
        if weights and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise ValueError(
                f"Expected finite weights of 0 or more, and one above 0, but got {dict(self.rewards)}. Rewards of "
                "weight 0 are only measured."
            )
        if self.images == 1 and self.compares_images:
            raise ValueError(
                f"Expected at least 2 images of each prompt for {name}, which makes them differ, but got 1. Pass "
                "`--images 4`, say."
            )
        for name, _ in self.rewards:
            check_reward(name, [self.model])
        check_device(self.device)

    @property
    def compares_images(self) -> bool:
        """Return whether the method optimizes the differences between the images of a prompt."""
        return self.method.diversity is not None or self.method.name == "cno"

    def settings(self) -> dict[str, Any]:
        """Return everything that the images of a prompt depend on, as JSON values."""
        values = {
            "model": self.model.name,
            "call": dict(self.model.call),
            "method": {"name": self.method.name, **self.method.settings},
            "rewards": dict(self.rewards),
            "images": self.images,
            "seed": self.seed,
            "budget": self.budget,
            "dtype": self.dtype,
        }
        return json.loads(json.dumps(values))

    def jobs(self) -> list["Job"]:
        """Return one job for each prompt, in order."""
        before: Counter[str] = Counter()
        found = []
        for number, prompt in enumerate(self.prompts.prompts, 1):
            first = self.seed + before[prompt.text] * self.images
            where = prompt.where or f"prompt {number} of {self.prompts.name}"
            found.append(Job(prompt.text, before[prompt.text], tuple(range(first, first + self.images)), where))
            before[prompt.text] += 1
        return found


@dataclasses.dataclass(frozen=True)
class Job:
    """One prompt.

    Its files and seeds depend on the prompt and not on its position, so lines may be added to the file of prompts.

    Attributes:
        prompt: The text.
        repeat: The number of earlier jobs with the same text.
        seeds: One for each image.
        where: The position of the prompt, for messages.
    """

    prompt: str
    repeat: int
    seeds: tuple[int, ...]
    where: str

    @property
    def name(self) -> str:
        """The common part of the names of its files: the first words of the prompt, and a hash."""
        digest = hashlib.sha256(f"{self.repeat} {self.prompt}".encode()).hexdigest()[:10]
        return "-".join(filter(None, (prompt_slug(self.prompt), digest)))


class ImageFolder:
    """The files of a generation. Each file is replaced as a whole, and the record of a prompt is written last."""

    def __init__(self, path: Path) -> None:
        self.path, self.images = path, path / "images"

    def claim(self, settings: dict[str, Any]) -> None:
        """Write the settings, or check that they equal those already here, if anything was generated with them.

        Raises:
            CannotEvaluate: If they do not, or the folder cannot be written to.
        """
        file = self.path / "settings.json"
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            if not file.exists() or not self.has_files:
                write_json(file, settings)
                return
        except OSError as error:
            raise CannotEvaluate(f"Expected a folder to write to, but got {self.path}: {error}.") from None
        if changed := settings_diff(read_object(file, OTHERS), settings):
            raise CannotEvaluate(
                f"Expected the settings that {self.path} was created with, but got others: {'; '.join(changed)}. "
                f"{OTHERS}"
            )

    @property
    def has_files(self) -> bool:
        """Return whether there is a noise, which is written in each step, or an image."""
        return any(path.suffix in (".safetensors", ".png") for path in self.images.iterdir())

    def noise(self, job: Job) -> Path:
        return self.images / f"{job.name}.safetensors"

    def picture(self, job: Job, image: int, before: bool) -> Path:
        return self.images / f"{job.name}-{image}{'-before' * before}.png"

    def record_path(self, job: Job) -> Path:
        return self.images / f"{job.name}.json"

    def record(self, job: Job) -> dict[str, Any] | None:
        """Return what is known about a job, or `None` if nothing is, or if its record is damaged."""
        try:
            found = json.loads(self.record_path(job).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        known = isinstance(found, dict) and (found.get("prompt"), found.get("seeds")) == (job.prompt, list(job.seeds))
        return found if known and self.is_whole(found, job) else None

    def is_whole(self, record: Mapping[str, Any], job: Job) -> bool:
        """Return whether a record has an error, or the files of its job and each reward of each image."""
        if "error" in record:
            return isinstance(record["error"], str)
        rewards = [record.get(name) for name in ("rewards before", "rewards")]
        rows = [row for each in rewards if isinstance(each, dict) for row in each.values()]
        whole = all(isinstance(row, list) and len(row) == len(job.seeds) for row in rows)
        whole = whole and all(isinstance(score, int | float | None) for row in rows for score in row)
        files = self.files(job)
        return whole and all(isinstance(each, dict) for each in rewards) and {**record, **files} == record

    def files(self, job: Job) -> dict[str, Any]:
        """Return the names of the files of a job, relative to the folder."""
        numbers = range(len(job.seeds))
        return {
            "images": [self.relative(self.picture(job, image, False)) for image in numbers],
            "before": [self.relative(self.picture(job, image, True)) for image in numbers],
            "noise": self.relative(self.noise(job)),
        }

    def finished(self, job: Job) -> bool:
        """Return whether a job is done: its record has no error, and none of its files was deleted."""
        record = self.record(job)
        if record is None or "error" in record:
            return False
        pictures = (self.picture(job, image, before) for image in range(len(job.seeds)) for before in (True, False))
        return all(path.is_file() for path in (self.noise(job), *pictures))

    def remove_damaged_noise(self, job: Job) -> None:
        """Remove the noise of a job if it cannot be read, so that it is optimized anew."""
        try:
            NoiseResult.load(self.noise(job))
        except FileNotFoundError:
            pass
        except ValueError:
            self.noise(job).unlink()

    def save(self, job: Job, result: NoiseResult, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> None:
        """Write the images of a job and its record; its noise was written while it was optimized."""
        for pictures, is_before in ((before, True), (after, False)):
            for image, picture in enumerate(pictures):
                path = self.picture(job, image, is_before)
                atomic_write(path, functools.partial(picture.save, format="PNG"))
        record = {
            "prompt": job.prompt,
            "seeds": list(job.seeds),
            **self.files(job),
            "rewards before": {name: values.tolist() for name, values in result.initial_scores.items()},
            "rewards": {name: values.tolist() for name, values in result.best_scores.items()},
            "evaluations": len(result.losses),
            "stopped": result.provenance.get("stopped"),
            "seconds": result.provenance.get("seconds"),
        }
        write_json(self.record_path(job), record)

    def save_error(self, job: Job, error: str) -> None:
        write_json(self.record_path(job), {"prompt": job.prompt, "seeds": list(job.seeds), "error": error})

    def relative(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def other_jobs(self, jobs: Iterable[Job], first_seed: int) -> list[Job]:
        """Return the finished jobs of earlier runs of the same settings that are not among `jobs`."""
        names, found = {job.name for job in jobs}, []
        for path in sorted(self.images.glob("*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                prompt, seeds = str(record["prompt"]), tuple(record["seeds"])
                job = Job(prompt, (seeds[0] - first_seed) // len(seeds), seeds, path.name)
            except (OSError, ValueError, RecursionError, LookupError, TypeError, ZeroDivisionError):
                continue
            if job.name == path.stem and job.name not in names and self.finished(job):
                found.append(job)
        return found

    def report(
        self, jobs: Iterable[Job], problems: Iterable[str], others: Iterable[Job], title: str
    ) -> list[dict[str, Any]]:
        """Write `results.jsonl` and `index.html`, and return the records of the jobs in their order.

        Args:
            jobs: The jobs of this run.
            problems: The errors of entries that are no prompts.
            others: The finished jobs of earlier runs.
            title: The heading of the page.
        """
        records, earlier = ([record for job in each if (record := self.record(job))] for each in (jobs, others))
        unread = [{"prompt": None, "error": problem} for problem in problems]
        every = [*records, *unread, *earlier]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in every)
        for name, text in (("results.jsonl", lines), ("index.html", page(every, title))):
            atomic_write(self.path / name, lambda part, text=text: part.write_text(text, encoding="utf-8"))
        return records


class Generation:
    """A request that runs in a folder. Every process of a launch creates one and calls `run`.

    Args:
        request: The request.
        output: The folder; it may hold finished prompts of the same settings.
    """

    def __init__(self, request: Request, output: Path) -> None:
        self.request, self.folder, self.jobs = request, ImageFolder(output), request.jobs()
        # long timeout: the first process to finish waits for the last
        self.processes = PartialState(cpu=request.device == "cpu", timeout=datetime.timedelta(days=365))
        self.next_report = 0.0
        self.others: list[Job] = []
        self.finished_before = 0

    @property
    def is_main(self) -> bool:
        """Return whether this process prints and writes the report."""
        return self.processes.is_main_process

    @property
    def device(self) -> torch.device:
        device = torch.device(self.request.device or self.processes.device or "cpu")
        several = device.type == "cuda" and device.index is None
        return torch.device("cuda", self.processes.local_process_index) if several else device

    @property
    def title(self) -> str:
        request = self.request
        rewards = ", ".join(f"{name} × {weight:g}" if weight != 1 else name for name, weight in request.rewards)
        return f"{request.method.label} on {request.model.name}" + f", {rewards}" * bool(rewards)

    def run(self) -> int:
        """Generate what is missing, and write all files. Return the number of failed prompts, 0 on other processes.

        Raises:
            CannotEvaluate: If another process writes to the folder, it has other settings, or something cannot load.
        """
        with contextlib.ExitStack() as stack:
            if self.is_main:
                stack.enter_context(locked(self.folder.path))
                self.folder.claim(self.request.settings())
                self.others = self.folder.other_jobs(self.jobs, self.request.seed)
                self.finished_before = sum(map(self.folder.finished, self.jobs))
                self.report()
            self.processes.wait_for_everyone()
            mine = self.jobs[self.processes.process_index :: self.processes.num_processes]
            missing = [job for job in mine if not self.folder.finished(job)]
            try:
                self.generate_all(missing, len(mine))
                self.processes.wait_for_everyone()
            except BaseException:
                if self.is_main:
                    self.report()
                raise
            return self.summarize(self.report()) if self.is_main else 0

    def generate_all(self, missing: Sequence[Job], count: int) -> None:
        """Generate the missing jobs of `count`. What cannot be drawn is named first, before anything is loaded."""
        for problem in self.request.prompts.problems if self.is_main else ():
            print(shown(problem, 1000), file=sys.stderr)
        errors = {job: error for job in missing if (error := self.refusal(job))}
        for job, error in errors.items():
            self.fail(job, error)
        todo = [job for job in missing if job not in errors]
        if not todo:
            return
        pipe, method = self.load()
        show = {"unit": "prompt", "dynamic_ncols": True, "disable": None if self.is_main else True}
        with tqdm(desc=self.request.method.name, total=count, initial=count - len(todo), **show) as bar:
            for job in todo:
                try:
                    self.generate(job, pipe, method)
                except (ValueError, TypeError, RuntimeError) as error:
                    self.fail(job, one_line(error))
                bar.update()
                if self.is_main and time.monotonic() >= self.next_report:
                    self.report()

    def refusal(self, job: Job) -> str:
        """Return why the model cannot draw a prompt, or an empty string."""
        try:
            if self.request.model.embedded:
                shapes_world.parse(job.prompt)
        except ValueError as error:
            return one_line(error)
        return ""

    def fail(self, job: Job, error: str) -> None:
        self.folder.save_error(job, error)
        tqdm.write(f"{shown(job.where)}: {shown(error, 1000)}", file=sys.stderr)

    def load(self) -> tuple[Any, NoiseOptimizer]:
        """Load the model and the method. Raises `CannotEvaluate` for what cannot be loaded or cannot work."""
        request, model = self.request, self.request.model
        try:
            with quiet_libraries():
                pipe = load_pipeline(model, request.dtype, self.device)
                check_call(pipe, model)
                rewards = [(load_reward(name, self.device), weight) for name, weight in request.rewards]
                given = rewards or getattr(METHODS[request.method.name], "rewards", None)
                method = request.method.build(given, self.device if model.embedded else None)
                method.objective(pipe)
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise CannotEvaluate(f"Cannot run {request.method.label} on {model.name}: {one_line(error)}") from error
        # `None`: no bar when stderr is not a terminal
        pipe.set_progress_bar_config(disable=None if self.is_main else True, leave=False)
        return pipe, method

    def generate(self, job: Job, pipe: Any, method: NoiseOptimizer) -> None:
        """Optimize the noise of a prompt, unless that was done before, and draw its images with the stock pipeline."""
        call = {**self.request.model.call, "num_images_per_prompt": len(job.seeds)}
        self.folder.remove_damaged_noise(job)
        files: dict[str, Any] = dict.fromkeys(("save_noise_to", "resume_from"), self.folder.noise(job))
        result = optimize_noise(
            pipe,
            job.prompt,
            method,
            callbacks=TimeBudget(self.request.budget) if self.request.budget else None,
            generator=generators(job.seeds),
            noise_sampler=self.noise_sampler,
            **files,
            **call,
        )
        before = pipe(job.prompt, generator=generators(job.seeds), **call, **self.first_latents(job, pipe, call)).images
        after = pipe(job.prompt, latents=result.latents.to(pipe.device), generator=result.generator(), **call).images
        self.folder.save(job, result, before, after)

    @property
    def noise_sampler(self) -> Any:
        """The distribution of the initial noise; `None` for that of the pipeline."""
        return self.request.method.settings.get("noise_sampler")

    def first_latents(self, job: Job, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the argument `latents` of the images before, for noise that the pipeline does not draw itself."""
        if self.noise_sampler is None:
            return {}
        drawn = {"generator": generators(job.seeds), "noise_sampler": self.noise_sampler}
        return {"latents": optimize_noise(pipe, job.prompt, PlainSampling(), **drawn, **call).latents}

    def report(self) -> list[dict[str, Any]]:
        """Write the report; the next one is due after at least 20 times the seconds that this one took."""
        began = time.monotonic()
        records = self.folder.report(self.jobs, self.request.prompts.problems, self.others, self.title)
        ended = time.monotonic()
        self.next_report = ended + max(SECONDS_BETWEEN_REPORTS, 20 * (ended - began))
        return records

    def summarize(self, records: Sequence[dict[str, Any]]) -> int:
        """Print the mean rewards before and after, and where the files are; return the number of failed prompts."""
        done = [record for record in records if "error" not in record]
        for name in done[0]["rewards"] if done else ():
            before, after = (mean([record[key].get(name) for record in done]) for key in ("rewards before", "rewards"))
            print(f"{name}: {before:.4g} → {after:.4g}, mean of {len(done) * self.request.images} images, optimized")
        total, before = len(self.jobs) + len(self.request.prompts.problems), self.finished_before
        earlier = f", {before} were finished before" * bool(before)
        others = f"; also shown: {len(self.others)} more of this folder" * bool(self.others)
        files = f"{self.folder.path / 'index.html'}, results.jsonl, images/"
        print(f"wrote {len(done) - before} of {total} prompts{earlier}: {files}{others}")
        return total - len(done)


def requires_rewards(method: MethodChoice) -> bool:
    """Return whether a method cannot run without rewards of the user."""
    fields = {field.name: field for field in dataclasses.fields(METHODS[method.name])}
    return method.takes_rewards and fields["rewards"].default is dataclasses.MISSING


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator for each image; on the CPU, for equal noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def mean(rows: Sequence[Sequence[float] | None]) -> float:
    values = [value for row in rows for value in row or () if value is not None]  # `None` is what was not finite
    return sum(values) / len(values) if values else float("nan")
