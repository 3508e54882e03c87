"""Base class of callbacks per denoising step."""

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers.callbacks import PipelineCallback

from .sampling_time import position_of_call


class DenoisingCallback(PipelineCallback):
    """Base class of callbacks per *denoising* step of a stock pipeline: `pipe(prompt, callback_on_step_end=callback)`.

    (`NoiseCallback` is per *optimization* step.) A pipeline calls it after each step, so it cannot affect the first
    model call, and a pipeline call needs at least two steps. diffusers' `MultiPipelineCallbacks` combines several. An
    object can be reused for one call after another: it resets at the first step, also after an exception.

    Some pipelines (Flux, Flux.2, Qwen-Image, Lumina 2, Z-Image) ignore which tensors a callback needs. For these, also
    pass `callback_on_step_end_tensor_inputs=callback.tensor_inputs`; otherwise the first step raises an error.

    Args:
        tensor_inputs: Names of the tensors that the pipeline passes, out of `pipe._callback_tensor_inputs`.
    """

    def __init__(self, tensor_inputs: Sequence[str]) -> None:
        super().__init__()
        self._tensor_inputs = list(tensor_inputs)

    @property
    def tensor_inputs(self) -> list[str]:
        return self._tensor_inputs

    def check(self, pipeline: Any) -> None:
        """Check that a pipeline supports this callback, before anything runs.

        Raises:
            TypeError: If it has no `callback_on_step_end`.
            ValueError: If it does not pass its callbacks a tensor that this one needs.
        """
        name, known = type(pipeline).__name__, getattr(pipeline, "_callback_tensor_inputs", [])
        if "callback_on_step_end" not in inspect.signature(type(pipeline).__call__).parameters:
            raise TypeError(
                f"Expected a pipeline with `callback_on_step_end`, but {name} has none. Optimize its initial noise "
                "instead, with `optimize_noise`."
            )
        if missing := [tensor for tensor in self.tensor_inputs if tensor not in known]:
            raise ValueError(
                f"Expected a pipeline that passes callbacks {', '.join(self.tensor_inputs)}, but {name} does not pass "
                f"{', '.join(missing)}. Construct {type(self).__name__} for tensors out of {', '.join(known)}."
            )

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if step_index == 0:
            self.check(pipeline)
            self.require(pipeline, callback_kwargs)
            self.position = position_of_call(pipeline, timesteps)
            self.on_call_start(pipeline, callback_kwargs)
        self.on_step(pipeline, self.position + step_index + 1, callback_kwargs)
        if step_index == pipeline.num_timesteps - 1:
            self.on_call_end(pipeline)
        return callback_kwargs

    def require(self, pipeline: Any, callback_kwargs: dict[str, Any]) -> None:
        """Raise `ValueError` for a call that lacks one of the `tensor_inputs` or has a single step."""
        if missing := [tensor for tensor in self.tensor_inputs if tensor not in callback_kwargs]:
            raise ValueError(
                f"Expected the tensors {', '.join(self.tensor_inputs)}, but got no {', '.join(missing)}: "
                f"{type(pipeline).__name__} does not read them from the callback. Also pass "
                f"`callback_on_step_end_tensor_inputs={self.tensor_inputs}`."
            )
        if pipeline.num_timesteps < 2:
            raise ValueError(
                f"Expected at least 2 denoising steps for {type(self).__name__}, which acts after a step on the next, "
                "but got 1. Pass `num_inference_steps=2` or more."
            )

    def on_call_start(self, pipeline: Any, callback_kwargs: dict[str, Any]) -> None:
        """Called once, after the first step, before `on_step`."""

    def on_step(self, pipeline: Any, index: int, callback_kwargs: dict[str, Any]) -> None:
        """Change `callback_kwargs` in place.

        `index` is the position of the next model call in `scheduler.timesteps`; after the last step, one past the end.
        """

    def on_call_end(self, pipeline: Any) -> None:
        """Called once, after the last step, but not if the call ends in an exception."""
