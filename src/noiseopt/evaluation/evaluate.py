"""The evaluation: compute every missing unit, on one or more processes, then write the tables and figures."""

import contextlib
import datetime
import functools
import gc
import inspect
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tqdm import tqdm

from .. import shapes_world
from ..pipelines.sampling.first_call import stock_call
from ..quiet import quiet_libraries
from .calibration import calibrate
from .embedded_diversity import towers_of
from .folder import CannotEvaluate, ResultFolder
from .instruments import NEIGHBORS, Instruments, read_images
from .metrics import coverage
from .plan import Contender, ModelChoice, Plan
from .table import Entry, Numbers, Results, cost_csv, cost_markdown, costs, markdown, table_csv
from .unit import Studio, write_json, write_whole


class Evaluation:
    """A plan that runs in a folder. Every process of a launch creates one and calls `run`.

    Units are distributed by prompt. Each process writes finished units to files and keeps no other state, so units may
    come from any process and any number of interrupted runs.

    Args:
        plan: The plan.
        output: The folder; it may hold units of the same plan.
    """

    def __init__(self, plan: Plan, output: Path) -> None:
        self.plan, self.folder = plan, ResultFolder(output)
        # long timeout: the first process to finish waits for the last
        self.processes = PartialState(cpu=plan.device == "cpu", timeout=datetime.timedelta(days=365))
        self.device = self.device_of_process()

    def device_of_process(self) -> torch.device:
        if self.plan.device is None:
            return self.processes.device or torch.device("cpu")
        device = torch.device(self.plan.device)
        several = device.type == "cuda" and device.index is None
        return torch.device("cuda", self.processes.local_process_index) if several else device

    @property
    def is_main(self) -> bool:
        """Return whether this process prints, calibrates and writes the tables."""
        return self.processes.is_main_process

    def run(self) -> Results | None:
        """Compute the missing units and write all files. Return the results on the main process, `None` on others.

        Raises:
            CannotEvaluate: If the folder belongs to another plan, or something cannot be loaded.
        """
        if self.is_main:
            self.fetch_weights()
            self.folder.claim(self.plan.settings(self.device.type))
        self.processes.wait_for_everyone()
        with threads(self.plan.threads), self.progress() as bar:
            for model in self.plan.models:
                self.evaluate(model, bar)
        self.processes.wait_for_everyone()
        return self.report() if self.is_main else None

    def fetch_weights(self) -> None:
        """Download missing weights of embedded models before any model runs."""
        plan = self.plan
        names = {model.name for model in plan.models} | {*plan.reward_names}
        names |= {plan.features} if plan.features_are_embedded else set()
        if any(model.embedded for model in plan.models):
            names |= {name for method in plan.methods if method.diversity for name in towers_of(method.diversity)}
        try:
            for name in shapes_world.MODELS:
                if name in names:
                    shapes_world.path(name)
        except OSError as error:
            raise CannotEvaluate(one_line(error)) from None

    def tasks(self, model: ModelChoice) -> list[tuple[Contender, int]]:
        """Return the units of this process in order; the contenders take turns in going first, with cold caches."""
        contenders, found = self.plan.contenders, []
        for index in range(self.processes.process_index, len(self.plan.prompts.prompts), self.processes.num_processes):
            turn = index % len(contenders)
            found += [(contender, index) for contender in contenders[turn:] + contenders[:turn]]
        return found

    def progress(self) -> tqdm:
        every = [(model, task) for model in self.plan.models for task in self.tasks(model)]
        done = sum(self.folder.finished(model.name, *task) for model, task in every)
        return tqdm(total=len(every), initial=done, unit="unit", disable=not self.is_main, dynamic_ncols=True)

    def evaluate(self, model: ModelChoice, bar: tqdm) -> None:
        """Compute the missing units of a model, which is loaded only if needed."""
        load = functools.cache(lambda: self.studio(model))
        if self.is_main and self.plan.best_of is None:
            for method in self.plan.methods:
                if method.has_control and method.label not in self.folder.calibration().get(model.name, {}):
                    bar.set_description(f"{model.name}: timing {method.label}")
                    found = calibrate(load(), method)
                    self.folder.save_calibration(model.name, method.label, found)
                    bar.write(f"{model.name}: best-of-{found['n']} takes as long as {method.label}")
        self.processes.wait_for_everyone()
        best_of = self.best_of()
        for contender, index in self.tasks(model):
            if not self.folder.finished(model.name, contender, index):
                bar.set_description(f"{model.name}: {contender.key}")
                n = best_of[model.name, contender.method.label] if contender.control and contender.method else None
                self.folder.save(load().measure(contender, index, n), contender)
                bar.update()
        load.cache_clear()
        gc.collect()

    def best_of(self) -> dict[tuple[str, str], int]:
        """Return N of best-of-N by model and method, as given or as measured."""
        known = self.folder.calibration()
        return {
            (model.name, method.label): self.plan.best_of or known[model.name][method.label]["n"]
            for model in self.plan.models
            for method in self.plan.methods
            if method.has_control
        }

    def studio(self, model: ModelChoice) -> Studio:
        """Load a model, and check that it accepts the arguments of the plan."""
        instruments = self.instruments
        try:
            with quiet_libraries():
                pipe = load_pipeline(model, self.plan.dtype, self.device)
            check_call(pipe, model)
        except (OSError, ValueError) as error:
            raise CannotEvaluate(f"Cannot run the model {model.name}: {one_line(error)}") from error
        studio = Studio(self.plan, model, pipe, instruments, self.device)
        for contender in self.plan.contenders:
            try:
                studio.method(contender, 1).objective(pipe)
                studio.check_steering(contender)
            except (ValueError, TypeError) as error:
                raise CannotEvaluate(f"Cannot run {contender.key} on {model.name}: {one_line(error)}") from error
        studio.warm_up()
        return studio

    @functools.cached_property
    def instruments(self) -> Instruments:
        """The instruments, loaded on first use."""
        try:
            with quiet_libraries():
                return Instruments.load(self.plan, self.device)
        except (OSError, ValueError, ImportError) as error:
            raise CannotEvaluate(f"Cannot load the rewards or features: {one_line(error)}") from error

    def results(self) -> Results:
        """Return the results of all units, which must be finished."""
        units = [
            self.folder.numbers(model.name, contender, index)
            for model in self.plan.models
            for contender in self.plan.contenders
            for index in range(len(self.plan.prompts.prompts))
        ]
        return Results(self.plan, units, self.best_of(), self.pooled_coverage())

    def pooled_coverage(self) -> dict[tuple[str, str], float]:
        """Return by (model, contender) the share of the reference images that its images cover.

        Empty without references.
        """
        if self.plan.references is None or self.plan.features is None:
            return {}
        try:
            references = read_images(self.plan.references, self.instruments)
        except ValueError as error:
            raise CannotEvaluate(str(error)) from None
        found = {}
        for model in self.plan.models:
            for contender in self.plan.contenders:
                indices = range(len(self.plan.prompts.prompts))
                features = [self.folder.features(model.name, contender, index) for index in indices]
                found[model.name, contender.key] = float(coverage(torch.cat(features), references, NEIGHBORS))
        return found

    def report(self) -> Results:
        """Write the tables, the numbers and the figures from the finished units."""
        from .figures import draw_figures  # only the main process needs matplotlib

        results = self.results()
        texts = {
            "table.md": markdown(results),
            "table.csv": table_csv([*results.entries(), *results.differences()]),
            "cost.md": cost_markdown(results),
            "cost.csv": cost_csv(results),
        }
        for name, text in texts.items():
            write_whole(self.folder.path / name, functools.partial(write_text, text))
        write_json(self.folder.path / "results.json", self.everything(results))
        draw_figures(results, self.folder)
        return results

    def everything(self, results: Results) -> dict[str, Any]:
        """Return all numbers as plain values."""
        return {
            "settings": self.folder.settings(),
            "machine": {"system": platform.platform(), "python": platform.python_version(), "device": str(self.device)},
            "calibration": self.folder.calibration(),
            "estimates": [plain_entry(entry) for entry in results.entries()],
            "differences": [plain_entry(entry) for entry in results.differences()],
            "warnings": results.warnings(),
            "cost": costs(results),
            "units": results.all_units(),
        }


def plain_entry(entry: Entry) -> dict[str, Any]:
    names = {"model": entry.model, "method": entry.method, "metric": entry.metric.name}
    return {**names, "optimized": entry.metric.optimized, **vars(entry.estimate), "prompts": entry.prompts}


def write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def check_call(pipe, model: ModelChoice) -> None:
    """Raise `ValueError` for an argument that a pipeline does not name; some accept and ignore those."""
    known = inspect.signature(stock_call(type(pipe))).parameters
    if unknown := [name for name in model.call if name not in known]:
        raise ValueError(f"Expected arguments of {type(pipe).__name__} as `--call`, but got {unknown[0]!r}.")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def load_pipeline(model: ModelChoice, dtype: str | None, device: torch.device) -> Any:
    """Load a pipeline without progress bars; embedded models in float32, others in bfloat16 on CUDA by default."""
    chosen = dtype or ("bfloat16" if device.type == "cuda" and not model.embedded else "float32")
    pipe = DiffusionPipeline.from_pretrained(model.source, dtype=getattr(torch, chosen)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of CPU threads inside the context; results depend on it in the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["CannotEvaluate", "Evaluation", "Numbers"]
