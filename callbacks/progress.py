"""Progress bar of a noise optimization."""

from .noise_callback import NoiseCallback
from .noise_state import NoiseState


class ProgressBar(NoiseCallback):
    """One tick per evaluation, with the mean best loss. `pipe.set_progress_bar_config` applies."""

    bar = None

    def on_run_start(self, state: NoiseState) -> None:
        self.bar = state.pipeline.progress_bar(total=state.steps)
        self.bar.set_description("Optimizing noise")
        self.bar.update(state.step + 1)  # of a resumed run

    def on_step_end(self, state: NoiseState) -> None:
        if self.bar is None:
            return
        if not self.bar.disable:  # reading the loss synchronizes with the device
            self.bar.set_postfix(best_loss=f"{state.best.loss.mean():.4f}", refresh=False)
        self.bar.total = state.steps  # methods may add evaluations at the end
        self.bar.update()

    def on_run_end(self, state: NoiseState) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None
