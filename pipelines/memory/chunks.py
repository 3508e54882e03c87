"""Images of a pipeline call in chunks, and gradients through one chunk at a time."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...private_names import TorchMode

PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
SAME_FOR_ALL = ("sigmas", "timesteps")  # lists that have no entry for each image
PLAIN_VALUES = (str, int, float, bool, type(None))
ChunkRun = Callable[[list[int], torch.Tensor], torch.Tensor]


class WholeBatchDraws(TorchMode):
    """Context in which a chunk gets the random numbers that the whole batch would draw for its images.

    A scheduler that adds noise at each step samples it for the images of the chunk alone, and so gets other numbers.
    In this context, `torch.randn` with the generator of the call samples noise for the whole batch instead, and returns
    the rows of the chunk.

    Args:
        generator: The generator of the call, shared by the batch.
        batch: The number of images in the whole batch.
        rows: The images of the chunk.
    """

    def __init__(self, generator: torch.Generator, batch: int, rows: list[int]) -> None:
        super().__init__()
        self.generator, self.batch, self.rows = generator, batch, rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.randn or kwargs.get("generator") is not self.generator:
            return func(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "size"}
        shape = kwargs["size"] if "size" in kwargs else args if isinstance(args[0], int) else args[0]
        if shape[0] != len(self.rows):
            return func(shape, **rest)
        return func((self.batch, *shape[1:]), **rest)[self.rows]


class ChunkedRun(torch.autograd.Function):
    """Autograd function of `run(rows, noise[rows])` for all chunks, in the memory of one.

    The backward pass runs each chunk again.

    The gradient equals that of the joint run, since no image depends on the noise of another.
    """

    @staticmethod
    def forward(ctx: Any, noise: torch.Tensor, run: ChunkRun, chunks: list[list[int]]) -> torch.Tensor:
        ctx.save_for_backward(noise)
        ctx.run, ctx.chunks = run, chunks
        return run_each(run, noise, chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (noise,) = ctx.saved_tensors
        found = torch.empty_like(noise)
        for rows in ctx.chunks:
            found[rows] = chunk_gradient(ctx.run, rows, noise[rows], gradient[rows])
        return found, None, None


def run_in_chunks(run: ChunkRun, noise: torch.Tensor, chunk_size: int, differentiable: bool) -> torch.Tensor:
    """Run a batch in chunks and return the joint result.

    Args:
        run: Function from the rows of a chunk and their noise to their results.
        noise: `(B, ...)`.
        chunk_size: Images per chunk, 1 or more.
        differentiable: Whether the result has a gradient with respect to the noise.
    """
    chunks = [rows.tolist() for rows in torch.arange(len(noise)).split(chunk_size)]
    if differentiable:
        return ChunkedRun.apply(noise, run, chunks)  # pyright: ignore[reportReturnType]
    return run_each(run, noise.detach(), chunks)


def run_each(run: ChunkRun, noise: torch.Tensor, chunks: list[list[int]]) -> torch.Tensor:
    """Return the results of all chunks in one tensor, without a graph."""
    first = run(chunks[0], noise[chunks[0]].detach())
    found = first.new_empty(len(noise), *first.shape[1:])
    found[chunks[0]] = first
    for rows in chunks[1:]:
        found[rows] = run(rows, noise[rows].detach())
    return found


def chunk_gradient(run: ChunkRun, rows: list[int], noise: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient of one chunk with respect to its noise; the graph is freed on return."""
    with torch.enable_grad():
        leaf = noise.detach().requires_grad_()
        output = run(rows, leaf)
    (found,) = torch.autograd.grad(output, leaf, gradient)
    return found


class BatchLayout:
    """Order of prompts and images in a batch, used to split the arguments of a call.

    Args:
        request: The arguments of the call.
        batch: B, the number of images.
    """

    def __init__(self, request: dict[str, Any], batch: int) -> None:
        self.request, self.batch = request, batch
        prompt = request.get("prompt")
        prompt = request.get("prompt_embeds") if prompt is None else prompt
        self.prompts = 1 if prompt is None or isinstance(prompt, str) else len(prompt)

    def prompt_rows(self, rows: list[int]) -> list[int]:
        """Return the index of the prompt of each image. Images of a prompt are adjacent."""
        return [row * self.prompts // self.batch for row in rows]

    def request_of(self, rows: list[int]) -> dict[str, Any]:
        """Return the arguments of a call for these images only.

        Raises:
            ValueError: For an argument other than prompts that may have an entry for each image.
        """
        for name, value in self.request.items():
            check_for_all(name, value)
        if self.prompts == 1:
            found, count = dict(self.request), len(rows)
        else:
            found, count = {name: self.argument_of(name, value, rows) for name, value in self.request.items()}, 1
        return found | {name: count for name in PER_PROMPT if name in found}

    def argument_of(self, name: str, value: Any, rows: list[int]) -> Any:
        """Return an argument of the call for the images `rows` alone.

        From a list or tensor with an entry for each prompt it takes the entries of their prompts.
        """
        if "prompt" not in name or isinstance(value, str) or not hasattr(value, "__len__"):
            return value
        return take_rows(value, self.prompt_rows(rows)) if len(value) == self.prompts else value

    def encoded_of(self, value: Any, rows: list[int]) -> Any:
        """Return the return value of `encode_prompt` for these images.

        Tensors and lists have an entry for each image, or for each prompt if the pipeline repeats them itself. Lists of
        tensors `(B, L, D)` have one for each layer of the encoder, as in Bria Fibo, and so have tensors `(N, B, L, D)`,
        as in HiDream. `(B + 1,)` are cumulative lengths, as in Kandinsky 5. Position ids `(L, 3)`, as in Flux, are
        shared by all images.

        Raises:
            ValueError: For a tensor with neither.
        """
        if hasattr(value, "kwargs_mapping"):
            return self.state_of(value, rows)
        if isinstance(value, dict):
            return {name: self.encoded_of(each, rows) for name, each in value.items()}
        if isinstance(value, torch.Tensor):
            return self.tensor_of(value, rows)
        by_layer = isinstance(value, list) and all(isinstance(each, torch.Tensor) and each.ndim > 2 for each in value)
        if isinstance(value, list) and len(value) == self.batch and not by_layer:
            return take_rows(value, rows)
        if isinstance(value, list) and len(value) == self.prompts > 1 and not by_layer:
            return take_rows(value, self.prompt_rows(rows))
        if isinstance(value, (tuple, list)):
            return type(value)([self.encoded_of(each, rows) for each in value])
        return value

    def state_of(self, state: Any, rows: list[int]) -> Any:
        """Return the state of a modular pipeline for these images."""
        found, several = copy.copy(state), (name for name in state.values if name not in SAME_FOR_ALL)
        mine = {name: take_rows(state.values[name], rows) for name in several if self.is_one_each(state.values[name])}
        found.values = {**state.values, **mine, "batch_size": len(rows), "num_images_per_prompt": 1}
        return found

    def is_one_each(self, value: Any) -> bool:
        """Return whether a value has an entry for each image; a list of numbers is a size or a place."""
        plain = isinstance(value, list) and all(isinstance(each, int | float) for each in value)
        has_rows = isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim > 0)
        return has_rows and not plain and len(value) == self.batch

    def tensor_of(self, value: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if value.ndim == 0 or (value.ndim == 2 and value.shape[1] == 3):
            return value
        if len(value) == self.batch:
            return value[rows]
        if value.ndim == 4 and value.shape[1] == self.batch:
            return value[:, rows]
        if value.ndim == 1 and len(value) == self.batch + 1 and value[0] == 0:
            lengths = value.diff()[rows]
            return torch.cat([value[:1], lengths.cumsum(0).to(value)])
        if len(value) == self.prompts:
            return value if self.prompts == 1 else value[self.prompt_rows(rows)]
        raise ValueError(
            f"Expected `encode_prompt` to return tensors with an entry for each of {self.batch} images, but got the "
            f"shape {tuple(value.shape)}, which cannot be split by image. Use `chunk_size=None`."
        )


def take_rows(value: Any, rows: Sequence[int]) -> Any:
    """Return the rows of a tensor, list or tuple."""
    return value[list(rows)] if hasattr(value, "shape") else type(value)(value[row] for row in rows)


def check_for_all(name: str, value: Any) -> None:
    """Raise `ValueError` if an argument, prompts aside, may have an entry for each image."""
    if "prompt" in name or name in SAME_FOR_ALL:
        return
    if (name.startswith("ip_adapter") and value is not None) or holds_several(value):
        raise ValueError(
            "Expected arguments that all images share, to generate images in chunks, but got "
            f"`{name}`, which may have one entry for each. Use `chunk_size=None`."
        )


def holds_several(value: Any) -> bool:
    """Return whether an argument holds several tensors, images or the like, rather than plain settings."""
    if isinstance(value, dict):
        return any(map(holds_several, value.values()))
    if getattr(value, "ndim", 0) > 0:  # torch and numpy
        return len(value) > 1
    return isinstance(value, (list, tuple)) and len(value) > 1 and not all(isinstance(x, PLAIN_VALUES) for x in value)
