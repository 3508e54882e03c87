"""Progress bar of a noise optimization."""

import torch

from .noise_callback import NoiseCallback
from .noise_state import NoiseState


class ProgressBar(NoiseCallback):
    """One tick per evaluation, with the mean scores of the best so far. `pipe.set_progress_bar_config` applies.

    Scores are in their own units, higher is better. A method without scores shows its mean loss.
    """

    bar = None

    def on_run_start(self, state: NoiseState) -> None:
        self.bar = state.pipeline.progress_bar(total=state.steps)
        self.bar.set_description("Optimizing noise")
        self.bar.update(state.step + 1)  # of a resumed run
        self.best: dict[str, torch.Tensor] = {}

    def on_step_end(self, state: NoiseState) -> None:
        if self.bar is None:
            return
        if not self.bar.disable:  # reading the values synchronizes with the device
            self.bar.set_postfix(self.shown(state), refresh=False)
        self.bar.total = state.steps  # methods may add evaluations at the end
        self.bar.update()

    def shown(self, state: NoiseState) -> dict[str, str]:
        """Return what stands behind the bar."""
        is_best = state.best.step == state.step
        for name, scores in state.scores.items():
            self.best[name] = torch.where(is_best, scores, self.best.get(name, torch.nan))
        means = {name: scores.nanmean() for name, scores in self.best.items()}  # NaN: from before it was resumed
        return {name: f"{mean:.4g}" for name, mean in (means or {"loss": state.best.loss.mean()}).items()}

    def on_run_end(self, state: NoiseState) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None
