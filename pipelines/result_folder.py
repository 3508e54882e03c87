"""Many prompts, each optimized by itself, with a file for the result of each."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..callbacks.noise_state import NoiseState
from ..callbacks.progress import ProgressBar

MOST_SLUG_CHARACTERS = 40
RESULT_NAME = re.compile(r"(\d{4,})(-.*)?\.safetensors")
Seeds = int | Sequence[int] | torch.Generator | None


class ResultFolder:
    """A folder with one result file for each prompt, such as `0007-a-red-square.safetensors`.

    Args:
        path: The folder, which `only_writer` has created.

    Raises:
        ValueError: For two files of one prompt.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.known: dict[int, Path] = {}
        for file in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            if found := RESULT_NAME.fullmatch(file.name):
                index = int(found[1])
                if index in self.known:
                    raise ValueError(
                        f"Expected one file for each prompt, but {self.path} has {self.known[index].name} and "
                        f"{file.name}. Move one of them away."
                    )
                self.known[index] = file

    def file(self, index: int, prompt: str) -> Path:
        """Return the file of a prompt: that which is there already, whatever it is of, or else a new name."""
        return self.known.get(index) or self.path / f"{prompt_name(index, prompt)}.safetensors"


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Create a folder, and keep other processes and threads from writing results to it in the meantime.

    The lock is on the folder itself: it ends with the process, and leaves no file. (Windows cannot lock a folder.)

    Raises:
        ValueError: If the path is a file, or someone else writes to the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder for the results, but {folder} is a file. Choose another name.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"Expected a folder to write to, but got {folder}: {error}. Choose another one.") from None
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Expected a folder that nobody else writes to, but another process is writing to {folder}. Wait until "
                "it has ended, or choose another folder. To share the work of one command, start it with `accelerate "
                "launch -m noiseopt ...`."
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(descriptor)


def prompt_name(index: int, prompt: str) -> str:
    """Return a name for the files of a prompt: its index from 0 and its first words."""
    return "-".join(filter(None, (f"{index:04d}", prompt_slug(prompt))))


def prompt_slug(prompt: str) -> str:
    """Return the first words of a prompt for the name of a file; an empty string without letters and digits."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:MOST_SLUG_CHARACTERS].strip("-")


class FolderBar(ProgressBar):
    """One progress bar over the steps of several runs.

    Args:
        pipe: The pipeline, whose progress bar it is.
        runs: The number of runs.
        steps: The number of ticks of each, that of its steps if known.
    """

    def __init__(self, pipe, runs: int, steps: int) -> None:
        self.runs, self.steps, self.run = runs, steps, 0
        self.bar = pipe.progress_bar(total=runs * steps)

    def on_run_start(self, state: NoiseState) -> None:
        self.go_to(self.run * self.steps + self.ticks(state))

    def on_step_end(self, state: NoiseState) -> None:
        self.go_to(self.run * self.steps + self.ticks(state))

    def ticks(self, state: NoiseState) -> int:
        """Return the ticks of the present run."""
        return round(self.steps * min(1, (state.step + 1) / state.steps))

    def on_run_end(self, state: NoiseState) -> None:
        pass

    def close(self) -> None:
        self.bar.close()

    def next_run(self) -> None:
        self.run += 1
        self.go_to(self.run * self.steps)

    def go_to(self, step: int) -> None:
        self.bar.set_description(f"Optimizing noise {min(self.run + 1, self.runs)} of {self.runs}", refresh=False)
        self.bar.update(step - self.bar.n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEntry:
    """One prompt of a folder: what its call has of its own, and its file."""

    prompt: str
    arguments: dict[str, Any]
    reward_prompt: str | None
    file: Path


def reward_prompts_for(prompts: Any, reward_prompt: str | Sequence[str] | None) -> list[str | None]:
    """Return the reward prompt of each prompt.

    Args:
        prompts: The prompts, a list of texts.
        reward_prompt: One text for all prompts, or one for each.

    Raises:
        ValueError: For anything else.
    """
    listed = isinstance(prompts, list | tuple) and len(prompts) > 0
    if not listed or not all(isinstance(prompt, str) for prompt in prompts):
        got = f"{prompts!r:.200}"
        raise ValueError(f"Expected a list of prompts beside `folder`, but got {got}. Pass `[prompt]` for one.")
    texts = [reward_prompt] * len(prompts) if reward_prompt is None or isinstance(reward_prompt, str) else reward_prompt
    listed = isinstance(texts, list | tuple) and len(texts) == len(prompts)
    if not listed or not all(isinstance(text, str | None) for text in texts):
        raise ValueError(
            f"Expected `reward_prompt` to be one text, or one for each of {len(prompts)} prompts, but got "
            f"{reward_prompt!r:.200}. Pass a list of texts."
        )
    return list(texts)


def prompt_entries(
    prompts: Sequence[str],
    reward_prompts: Sequence[str | None],
    folder: str | os.PathLike[str],
    generator: Seeds = None,
) -> list[PromptEntry]:
    """Return the calls of prompts whose results are in a folder. See `ResultFolder` and `generators_of`."""
    home, generators = ResultFolder(folder), generators_of(generator, len(prompts))
    return [
        PromptEntry(
            prompt=prompt,
            arguments={} if each is None else {"generator": each},
            reward_prompt=text,
            file=home.file(index, prompt),
        )
        for index, (prompt, each, text) in enumerate(zip(prompts, generators, reward_prompts, strict=True))
    ]


def generators_of(generator: Seeds, count: int) -> list[torch.Generator | None]:
    """Return a random stream for each of `count` prompts, which does not depend on the other prompts.

    `None` gives none: then each prompt draws from the global stream, another noise at each start. See `seeds_from`.
    """
    if generator is None:
        return [None] * count
    device = seed_device(generator)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds_from(generator, count)[:count]]


def seed_device(generator: Seeds) -> str:
    """Return the device that draws noise: the CPU, for equal noise on every device, unless a generator has another."""
    return str(generator.device) if isinstance(generator, torch.Generator) else "cpu"


def seeds_from(generator: Any, count: int, wanted: int | None = None) -> list[int]:
    """Return at least `count` different seeds.

    Args:
        generator: A seed s, from which number k gets s + k, a seed for each, or a generator for its seed.
        count: The least number of seeds.
        wanted: The number of seeds from a first one, `count` by default.

    Raises:
        ValueError: For too few seeds, and invalid or repeated ones.
    """
    first = generator.initial_seed() if isinstance(generator, torch.Generator) else generator
    given = range(first, first + (count if wanted is None else wanted)) if type(first) is int else generator
    seeds = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    valid = all(type(seed) is int and 0 <= seed < 2**64 for seed in seeds)
    if not valid or len(seeds) < count or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"Expected `generator` to be a seed of 0 or more, {count} different seeds, or a `torch.Generator`, but got "
            f"{generator!r}. From the seed s number k gets s + k."
        )
    return seeds
