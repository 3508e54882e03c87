"""Random streams of a pipeline call."""

import copy

import torch

from ...private_names import default_mps_generator


class RandomState:
    """Snapshot of the random streams of a call, from which every evaluation starts.

    Args:
        generator: The `generator` argument of the call; `None` for torch's default generator on `device`.
        device: The device of that default generator.
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, device: torch.device) -> None:
        self.several = isinstance(generator, list)
        streams = generator if isinstance(generator, list) else [generator or default_generator(device)]
        self.states = [(stream.device, stream.get_state(), stream.initial_seed()) for stream in streams]

    @property
    def seeds(self) -> list[int]:
        return [seed for _, _, seed in self.states]

    def generator(self) -> torch.Generator | list[torch.Generator]:
        """Return new generators in this state: a list if the call was given one."""
        fresh = []
        for device, state, _ in self.states:
            fresh.append(torch.Generator(device))
            fresh[-1].set_state(state)
        return fresh if self.several else fresh[0]

    def of_rows(self, rows: list[int]) -> "RandomState":
        """Return the streams of some images, or the stream that all images share."""
        found = copy.copy(self)
        found.states = [self.states[row] for row in rows] if self.several else self.states
        return found


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that torch uses on `device` by default."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    if device.type == "mps":
        return default_mps_generator()
    return torch.default_generator
