"""Random streams of a pipeline call."""

import contextlib
import copy
from collections.abc import Iterator

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

    def rewind(self, generator: torch.Generator | list[torch.Generator]) -> None:
        """Set generators of `generator()` to this state."""
        streams = generator if isinstance(generator, list) else [generator]
        for stream, (_, state, _) in zip(streams, self.states, strict=True):
            stream.set_state(state)

    def equals(self, other: "RandomState") -> bool:
        pairs = zip(self.states, other.states, strict=True)
        return all(torch.equal(own[1], theirs[1]) for own, theirs in pairs)

    def of_rows(self, rows: list[int]) -> "RandomState":
        """Return the streams of some images, or the stream that all images share."""
        found = copy.copy(self)
        found.states = [self.states[row] for row in rows] if self.several else self.states
        return found


class CallStart:
    """The random streams before a call draws anything: its own, and torch's global ones.

    Some pipelines draw before their initial noise, such as a sample of the posterior of a control image, and some of
    those from the global streams. Evaluations repeat these draws.
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, device: torch.device) -> None:
        self.device, self.own = device, RandomState(generator, device)
        self.shared = RandomState(self.global_streams(), device)

    def global_streams(self) -> list[torch.Generator]:
        return list({torch.default_generator: None, default_generator(self.device): None})

    def drew_from_global(self) -> bool:
        """Return whether the global streams were used since."""
        return not self.shared.equals(RandomState(self.global_streams(), self.device))

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Set the global streams to what they were; afterwards they stand where they stood."""
        now = RandomState(self.global_streams(), self.device)
        self.shared.rewind(self.global_streams())
        try:
            yield
        finally:
            now.rewind(self.global_streams())


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that torch uses on `device` by default."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    if device.type == "mps":
        return default_mps_generator()
    return torch.default_generator
