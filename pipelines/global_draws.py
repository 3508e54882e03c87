"""Samplers that draw from no generator: what they draw differs from one evaluation to the next."""

import torch
from torch.overrides import TorchFunctionMode

DRAWING = (torch.randn, torch.rand, torch.randint, torch.randn_like, torch.rand_like, torch.normal)


class only_from_generators(TorchFunctionMode):  # noqa: N801
    """Inside this context a random number that comes from no generator raises `ValueError`, which names the sampler.

    Every inner run begins with the generators in the same state, so that all of them see the same noise on the way;
    what is drawn from torch's own stream would be another objective in each of them. Only this thread is watched.

    Args:
        pipe: The pipeline that is called inside.
    """

    def __init__(self, pipe) -> None:
        super().__init__()
        self.names = type(pipe).__name__, type(pipe.scheduler).__name__

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DRAWING and kwargs.get("generator") is None:
            pipeline, scheduler = self.names
            raise ValueError(
                f"Expected all noise to come from `generator`, but {pipeline} with {scheduler} draws some on the way "
                "from torch's own stream, so that no two evaluations would see the same. Use a scheduler that draws "
                "nothing, or one whose seed is a setting: `DPMSolverSDEScheduler(noise_sampler_seed=0)`, "
                "`FlowMatchEulerDiscreteScheduler(stochastic_sampling=False)`."
            )
        return func(*args, **kwargs)
