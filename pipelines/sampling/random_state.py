"""The random streams of a pipeline call."""

import copy

import torch

from .internals import default_mps_generator


class RandomState:
    """The random streams of a call, as they were at one moment: every inner run starts from the same state."""

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, device: torch.device) -> None:
        self.several = isinstance(generator, list)
        streams = generator if isinstance(generator, list) else [generator or default_generator(device)]
        self.states = [(stream.device, stream.get_state(), stream.initial_seed()) for stream in streams]

    @property
    def seeds(self) -> list[int]:
        return [seed for _, _, seed in self.states]

    def generator(self) -> torch.Generator | list[torch.Generator]:
        """Fresh generators in this state, in the form that the pipeline was given."""
        fresh = []
        for device, state, _ in self.states:
            fresh.append(torch.Generator(device))
            fresh[-1].set_state(state)
        return fresh if self.several else fresh[0]

    def of_rows(self, rows: list[int]) -> "RandomState":
        """The streams of some images, or the one that all images share."""
        found = copy.copy(self)
        found.states = [self.states[row] for row in rows] if self.several else self.states
        return found


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on `device` when none is given."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    if device.type == "mps":
        return default_mps_generator()
    return torch.default_generator
