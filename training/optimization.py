"""Optimizer, moving average, schedule and checkpoints shared by all training stages."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

Model = TypeVar("Model", bound=nn.Module)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates for weight matrices, Adam for all other parameters.

    https://kellerjordan.github.io/posts/muon, with updates scaled to the size of Adam's as in
    https://arxiv.org/abs/2502.16982, so that one learning rate serves both. These models need about half of Adam's
    samples.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"] * (p.ndim > 1))
                matrix = p.ndim > 1 and min(p.shape[0], p[0].numel()) > 8
                p.sub_(group["lr"] * (self._orthogonal(p, p.grad) if matrix else self._adam(p, p.grad)))

    def _orthogonal(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
        momentum.lerp_(gradient, 0.05)
        update = gradient.lerp(momentum, 0.95).flatten(1)
        wide = update if update.shape[0] <= update.shape[1] else update.T
        x = wide / (wide.norm() + 1e-7)
        for _ in range(3):
            a = x @ x.T
            x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        x = x if update.shape[0] <= update.shape[1] else x.T
        return 0.2 * math.sqrt(max(x.shape)) * x.view_as(p)

    def _adam(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        state = self.state[p]
        first, second = (state.setdefault(key, torch.zeros_like(p)) for key in ("first", "second"))
        state["steps"] = state.get("steps", 0) + 1
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.01)
        return first / (1 - 0.9 ** state["steps"]) / ((second / (1 - 0.99 ** state["steps"])).sqrt() + 1e-8)


class Run(Generic[Model]):
    """A training stage: optimizer, moving average, schedule, learning curve and checkpoints.

    Args:
        model: The model.
        path: The checkpoint; if it exists, the run resumes from it.
        samples: Number of samples of the stage.
        batch: Samples per update.
        lr: Peak learning rate.
        decay: Decay of the moving average.
        look: Called with the averaged model and a path for sample images, after every tenth of the run.
        dtype: The precision of `fast`, the copy of the model that is to be run; gradients, updates and weights are in
            single precision.
    """

    def __init__(
        self,
        model: Model,
        path: Path,
        samples: int,
        batch: int,
        lr: float,
        decay: float = 0.998,
        look: Callable[[Model, Path], None] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.path, self.samples, self.batch, self.lr, self.decay = model, path, samples, batch, lr, decay
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizer = Muon([p for p in model.parameters() if p.requires_grad], lr)
        self.seen, self.seconds, self.look = 0, 0.0, look
        self.curve: list[dict[str, float]] = []
        self._sums: dict[str, float] = {}
        if path.exists():
            self.load()
        self.fast = model if dtype == torch.float32 else fast(copy.deepcopy(model), dtype)
        torch.manual_seed(self.seen)

    def __iter__(self) -> Iterator[int]:
        """Yield the number of samples seen until the stage is done, saving regularly."""
        steps, before, clock = 0, self.seconds, time.time()
        saved = clock
        with tqdm(total=self.samples, initial=self.seen, desc=self.path.stem, mininterval=5) as bar:
            while self.seen < self.samples:
                looks = 10 * self.seen // self.samples
                yield self.seen
                steps += 1
                bar.update(self.seen - bar.n)
                self.seconds = before + time.time() - clock
                if steps % 100 == 0:
                    bar.set_postfix(self._record())
                if steps % 100 == 0 or time.time() - saved > 300:
                    self.save()
                    saved = time.time()
                if self.look and 10 * self.seen // self.samples > looks:
                    self.look(self.average, self.path.with_name(f"{self.path.stem}_{self.seen}.png"))
        self.save()

    def step(self, losses: dict[str, Tensor]) -> None:
        """Update by the sum of the losses; warm-up of 100 steps, then cosine decay to 2%."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self._take_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1.0, (self.seen / self.batch + 1) / 100)
        cosine = 0.51 + 0.49 * math.cos(math.pi * min(1.0, self.seen / self.samples))
        self.optimizer.param_groups[0]["lr"] = self.lr * warm * cosine
        self.optimizer.step()
        if self.fast is not self.model:
            with torch.no_grad():
                for copied, p in zip(self.fast.parameters(), self.model.parameters(), strict=True):
                    copied.copy_(p)
        self.seen += self.batch
        decay = min(self.decay, (self.seen / self.batch + 1) / (self.seen / self.batch + 20))
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(loss.detach())
        self._sums["updates"] = self._sums.get("updates", 0.0) + 1

    def _take_gradients(self) -> None:
        """Move the gradients of the fast copy to the model."""
        if self.fast is not self.model:
            for copied, p in zip(self.fast.parameters(), self.model.parameters(), strict=True):
                p.grad, copied.grad = None if copied.grad is None else copied.grad.float(), None

    def _record(self) -> dict[str, float]:
        """Append the mean losses since the last record to the curve."""
        updates = self._sums.pop("updates")
        means = {name: round(total / updates, 5) for name, total in self._sums.items()}
        self.curve.append({"samples": self.seen, "seconds": round(self.seconds, 1)} | means)
        self._sums = {}
        return means

    def save(self) -> None:
        """Write everything needed to resume."""
        state = {"model": self.model.state_dict(), "average": self.average.state_dict(), "seen": self.seen}
        state |= {"batch": self.batch, "seconds": self.seconds, "curve": self.curve}
        state["optimizer"] = self.optimizer.state_dict()
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def load(self) -> None:
        """Resume from the checkpoint."""
        state = torch.load(self.path, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seen, self.seconds, self.curve = state["seen"], state["seconds"], state["curve"]


def averaged(path: Path, model: Model) -> Model:
    """Load the moving average of a stage's weights."""
    model.load_state_dict(torch.load(path, map_location="cpu")["average"])
    return model.requires_grad_(False).eval()


def fast(module: Model, dtype: torch.dtype) -> Model:
    """Convert a module to a precision, and to the memory format in which convolutions are fast."""
    return module.to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def last_of(folder: Path, *stages: str) -> Path | None:
    """Return the checkpoint of the last of some stages that has one."""
    paths = [path for path in (folder / f"{stage}.pt" for stage in stages) if path.exists()]
    return paths[-1] if paths else None
