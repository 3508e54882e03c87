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
from ..registry import did_you_mean
from .calibration import calibrate
from .folder import CannotEvaluate, EvaluationFolder, locked
from .instruments import Instruments, read_images
from .metrics import coverage
from .plan import NEIGHBORS, Cell, ModelChoice, Plan
from .plane import plane_of
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
        self.plan = plan
        # long timeout: the first process to finish waits for the last
        self.processes = PartialState(cpu=plan.device == "cpu", timeout=datetime.timedelta(days=365))
        self.device = self.device_of_process()
        self.folder = EvaluationFolder(output, plan, self.device.type)

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
        with contextlib.ExitStack() as stack:
            if self.is_main:
                stack.enter_context(locked(self.folder.path))
                self.folder.claim()
                self.fetch_weights()
            stack.enter_context(threads(self.plan.threads))
            bar = stack.enter_context(self.progress())
            if self.is_main:
                self.check_models()
            self.processes.wait_for_everyone()
            for model in self.plan.models:
                self.evaluate(model, bar)
            self.processes.wait_for_everyone()
            return self.report() if self.is_main else None

    def check_models(self) -> None:
        """Check that each of several models can run what is missing, so that the last fails before the first runs.

        A single one is checked when it is loaded.
        """
        missing = [model for model in self.plan.models if not all(map(self.folder.finished, self.cells(model)))]
        if len(missing) > 1:
            for model in missing:
                self.studio(model)
                gc.collect()

    def fetch_weights(self) -> None:
        """Download missing weights of embedded models before any model runs."""
        plan = self.plan
        names = {model.name for model in plan.models} | {*plan.reward_names}
        names |= set(filter(plan.is_tower, plan.all_features))
        if any(model.embedded for model in plan.models):
            names |= {name for method in plan.methods for name in method.towers}
        try:
            for name in shapes_world.MODELS:
                if name in names:
                    shapes_world.path(name)
        except OSError as error:
            raise CannotEvaluate(one_line(error)) from None

    def cells(self, model: ModelChoice, first: int = 0, every: int = 1) -> list[Cell]:
        """Return the units of a model in order; the contenders take turns in going first, with cold caches."""
        contenders, best_of, found = self.plan.contenders, self.best_of(), []
        for index in range(first, len(self.plan.prompts.prompts), every):
            turn = index % len(contenders)
            order = contenders[turn:] + contenders[:turn]
            found += [self.plan.cell(model, contender, index, best_of) for contender in order]
        return found

    def tasks(self, model: ModelChoice) -> list[Cell]:
        """Return the units of this process."""
        return self.cells(model, self.processes.process_index, self.processes.num_processes)

    def progress(self) -> tqdm:
        every = [cell for model in self.plan.models for cell in self.tasks(model)]
        done = sum(map(self.folder.finished, every))
        return tqdm(total=len(every), initial=done, unit="unit", disable=not self.is_main, dynamic_ncols=True)

    def evaluate(self, model: ModelChoice, bar: tqdm) -> None:
        """Compute the missing units of a model, which is loaded only if needed."""
        load = functools.cache(lambda: self.studio(model))
        if self.is_main and self.plan.best_of is None:
            for method in self.plan.methods:
                if method.has_control and (model.name, method.label) not in self.folder.calibration():
                    bar.set_description(f"{model.name}: timing {method.label}")
                    found = calibrate(load(), method)
                    self.folder.save_calibration(model, method, found)
                    bar.write(f"{model.name}: best-of-{found['n']} takes as long as {method.label}")
        self.processes.wait_for_everyone()
        for cell in self.tasks(model):
            if not self.folder.finished(cell):
                bar.set_description(f"{model.name}: {cell.contender.key}")
                self.folder.save(load().measure(cell.contender, cell.index, cell.best_of), cell)
                bar.update()
        load.cache_clear()
        gc.collect()

    def best_of(self) -> dict[tuple[str, str], int]:
        """Return N of best-of-N by model and method, as given or as far as it is measured."""
        if self.plan.best_of is None:
            return {key: row["n"] for key, row in self.folder.calibration().items()}
        return {
            (model.name, method.label): self.plan.best_of
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
                studio.check(contender)
            except (ValueError, TypeError) as error:
                raise CannotEvaluate(f"Cannot run {contender.key} on {model.name}: {one_line(error)}") from error
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
        units = [self.folder.numbers(cell) for model in self.plan.models for cell in self.cells(model)]
        return Results(self.plan, units, self.best_of(), self.pooled_coverage())

    def pooled_coverage(self) -> dict[tuple[str, str], float]:
        """Return by (model, contender) the share of the reference images that its images cover.

        Empty without references.
        """
        if self.plan.references is None or self.plan.features is None:
            return {}
        try:
            references = read_images(self.plan.references, self.instruments)
        except (ValueError, OSError) as error:
            raise CannotEvaluate(str(error)) from None
        features: dict[tuple[str, str], list[torch.Tensor]] = {}
        for cell in (cell for model in self.plan.models for cell in self.cells(model)):
            features.setdefault((cell.model.name, cell.contender.key), []).append(self.folder.features(cell))
        return {key: float(coverage(torch.cat(found), references, NEIGHBORS)) for key, found in features.items()}

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
            "calibration": list(self.folder.calibration().values()),
            "estimates": [plain_entry(entry) for entry in results.entries()],
            "differences": [plain_entry(entry) for entry in results.differences()],
            "pareto front": pareto_fronts(results),
            "warnings": results.warnings(),
            "cost": costs(results),
            "units": results.all_units(),
        }


def pareto_fronts(results: Results) -> dict[str, list[str]]:
    """Return the keys of the contenders on the Pareto front of each model that has a plane."""
    planes = {model.name: plane_of(results, model.name) for model in results.plan.models}
    return {
        name: [spot.contender.key for spot in plane.spots if spot.on_front] for name, plane in planes.items() if plane
    }


def plain_entry(entry: Entry) -> dict[str, Any]:
    names = {"model": entry.model, "method": entry.method, "metric": entry.metric.name}
    return {**names, "optimized": entry.metric.optimized, **vars(entry.estimate), "prompts": entry.prompts}


def write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def check_call(pipe, model: ModelChoice) -> None:
    """Raise `ValueError` for an argument that a pipeline does not name; some accept and ignore those."""
    known = inspect.signature(stock_call(type(pipe))).parameters
    if unknown := [name for name in model.arguments if name not in known]:
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"Expected arguments of {type(pipe).__name__} as `--call`, but got {unknown[0]!r}.{hint}")


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
