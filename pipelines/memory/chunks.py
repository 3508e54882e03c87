"""Some images of a pipeline call by themselves, and gradients through a few of them after the others."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

SAME_FOR_ALL = ("sigmas", "timesteps")  # lists of numbers that are not one for each image
PLAIN_VALUES = (str, int, float, bool, type(None))
ChunkRun = Callable[[list[int], torch.Tensor], torch.Tensor]


class WholeBatchDraws(TorchFunctionMode):
    """Random numbers for some images of a batch, as the whole batch would have drawn them from its one generator.

    Samplers that add noise on the way draw for the images that they have; inside this context a `torch.randn` for so
    many images from this generator draws for all and keeps the rows, so that the stream goes on as in the whole batch.

    Args:
        generator: The generator of the call.
        batch: How many images the whole batch has.
        rows: Which of them are drawn here.
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
    """`run(rows, noise[rows])` of all chunks of a batch, with the memory of one: the backward pass runs each again.

    The gradient is that of the joint run, as no image depends on the noise of another.
    """

    @staticmethod
    def forward(ctx: Any, noise: torch.Tensor, run: ChunkRun, chunks: list[list[int]]) -> torch.Tensor:
        ctx.save_for_backward(noise)
        ctx.run, ctx.chunks = run, chunks
        return run_each(run, noise, chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore
        (noise,) = ctx.saved_tensors
        found = torch.empty_like(noise)
        for rows in ctx.chunks:
            found[rows] = chunk_gradient(ctx.run, rows, noise[rows], gradient[rows])
        return found, None, None


def run_in_chunks(run: ChunkRun, noise: torch.Tensor, chunk_size: int, differentiable: bool) -> torch.Tensor:
    """`run` of a batch `(B, ...)`, at most `chunk_size` images at a time.

    Args:
        run: Rows of the batch, and their noise, to what is drawn of them.
        noise: `(B, ...)`.
        chunk_size: 1 or more.
        differentiable: Whether the result has a gradient, where the noise has one.
    """
    chunks = [rows.tolist() for rows in torch.arange(len(noise)).split(chunk_size)]
    if differentiable and noise.requires_grad:
        return ChunkedRun.apply(noise, run, chunks)  # pyright: ignore[reportReturnType]
    return run_each(run, noise.detach(), chunks)


def run_each(run: ChunkRun, noise: torch.Tensor, chunks: list[list[int]]) -> torch.Tensor:
    """The results of all chunks in one tensor, without a graph."""
    first = run(chunks[0], noise[chunks[0]].detach())
    found = first.new_empty(len(noise), *first.shape[1:])
    found[chunks[0]] = first
    for rows in chunks[1:]:
        found[rows] = run(rows, noise[rows].detach())
    return found


def chunk_gradient(run: ChunkRun, rows: list[int], noise: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of one chunk with respect to its noise; the graph is gone on return."""
    with torch.enable_grad():
        leaf = noise.detach().requires_grad_()
        output = run(rows, leaf)
    (found,) = torch.autograd.grad(output, leaf, gradient)
    return found


class BatchLayout:
    """Which prompt each image of a call has, and so what an argument of the call is for some of its images.

    Args:
        request: The arguments of the call.
        batch: B, how many images it draws.
    """

    def __init__(self, request: dict[str, Any], batch: int) -> None:
        self.request, self.batch = request, batch
        prompt = request.get("prompt")
        prompt = request.get("prompt_embeds") if prompt is None else prompt
        self.prompts = 1 if prompt is None or isinstance(prompt, str) else len(prompt)

    def prompt_rows(self, rows: list[int]) -> list[int]:
        """The prompt of each image: those of a prompt lie one after the other."""
        return [row * self.prompts // self.batch for row in rows]

    def request_of(self, rows: list[int]) -> dict[str, Any]:
        """The arguments of a call for these images alone.

        Raises:
            ValueError: For an argument that may hold something for each image and is none of the prompts.
        """
        for name, value in self.request.items():
            check_for_all(name, value)
        if self.prompts == 1:
            found, count = dict(self.request), len(rows)
        else:
            found, count = {name: self.picked(name, value, rows) for name, value in self.request.items()}, 1
        return found | ({"num_images_per_prompt": count} if "num_images_per_prompt" in found else {})

    def picked(self, name: str, value: Any, rows: list[int]) -> Any:
        """An argument for the prompts of these images; what is no argument for each prompt as it is."""
        if "prompt" not in name or isinstance(value, str) or not hasattr(value, "__len__"):
            return value
        return take(value, self.prompt_rows(rows)) if len(value) == self.prompts else value

    def encoded_of(self, value: Any, rows: list[int]) -> Any:
        """What `encode_prompt` returned, for these images.

        Tensors and lists have an entry for each image, or for each prompt where the pipeline repeats them itself;
        position ids `(L, 3)`, as those of Flux, are the same for all.

        Raises:
            ValueError: For a tensor with neither.
        """
        if isinstance(value, dict):
            return {name: self.encoded_of(part, rows) for name, part in value.items()}
        if isinstance(value, torch.Tensor):
            return self.tensor_of(value, rows)
        if isinstance(value, list) and len(value) == self.batch:
            return take(value, rows)
        if isinstance(value, list) and len(value) == self.prompts > 1:
            return take(value, self.prompt_rows(rows))
        if isinstance(value, (tuple, list)):
            return type(value)([self.encoded_of(part, rows) for part in value])
        return value

    def tensor_of(self, value: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if value.ndim == 0 or (value.ndim == 2 and value.shape[1] == 3):
            return value
        if len(value) == self.batch:
            return value[rows]
        if len(value) == self.prompts:
            return value if self.prompts == 1 else value[self.prompt_rows(rows)]
        raise ValueError(
            f"Expected `encode_prompt` to return tensors with an entry for each of {self.batch} images, but got the "
            f"shape {tuple(value.shape)}, of which no part can be told apart. Use `chunk_size=None`."
        )


def take(value: Any, rows: Sequence[int]) -> Any:
    """The rows of a tensor, or of a list or tuple."""
    return value[list(rows)] if hasattr(value, "shape") else type(value)(value[row] for row in rows)


def check_for_all(name: str, value: Any) -> None:
    """Raise `ValueError` for an argument that is no prompt and may hold something for each image."""
    if "prompt" in name or name in SAME_FOR_ALL:
        return
    if (name.startswith("ip_adapter") and value is not None) or holds_several(value):
        raise ValueError(
            f"Expected arguments that are the same for all images, to draw some of them by themselves, but got "
            f"`{name}`, which may hold one for each. Use `chunk_size=None`."
        )


def holds_several(value: Any) -> bool:
    """Whether there are several tensors, images or the like in an argument: numbers and strings are settings."""
    if isinstance(value, dict):
        return any(map(holds_several, value.values()))
    if getattr(value, "ndim", 0) > 0:  # torch and numpy
        return len(value) > 1
    return isinstance(value, (list, tuple)) and len(value) > 1 and not all(isinstance(x, PLAIN_VALUES) for x in value)
