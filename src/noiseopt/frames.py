"""Videos as batches of frames: which frames rewards and features look at, and the way back to one value per video."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch

Frames = int | Literal["first", "middle", "last", "all"] | Sequence[int]
NAMED = {"first": 0.0, "middle": 0.5, "last": 1.0}  # as shares of the way to the last frame
TextsT = TypeVar("TextsT")


def check_frames(frames: Any, count: int | None = None) -> None:
    """Raise `ValueError` for a choice of frames that no video has, or not one of `count` frames."""
    listed = frames if isinstance(frames, list | tuple) else [frames]
    numbers = bool(listed) and all(type(each) is int for each in listed)
    least = 1 if listed is not frames and numbers else 0
    if isinstance(frames, str) and frames in (*NAMED, "all"):
        return
    if not numbers or min(listed) < least:
        raise ValueError(
            f"Expected `frames` to be a number of evenly spaced frames, {[*NAMED, 'all']} or a list of indices from 0 "
            f"on, but got {frames!r}."
        )
    if listed is frames and count is not None and max(listed) >= count:
        raise ValueError(
            f"Expected `frames` of a video of {count}, with indices up to {count - 1}, but got {max(listed)}. Pass a "
            "number, such as `frames=4`, for evenly spaced ones."
        )


def frame_numbers(frames: Frames, count: int) -> list[int]:
    """Return the indices of the chosen frames of a video of `count`, in the given order.

    k evenly spaced frames include the first and the last one; a single one is in the middle.
    """
    check_frames(frames, count)
    if isinstance(frames, str):
        return list(range(count)) if frames == "all" else [round(NAMED[frames] * (count - 1))]
    if not isinstance(frames, int):
        return list(frames)
    if frames >= count:
        return list(range(count))
    return [round((k / (frames - 1) if frames > 1 else 0.5) * (count - 1)) for k in range(frames)]


def folded(videos: torch.Tensor) -> torch.Tensor:
    """Return the frames `(B·F, 3, H, W)` of videos `(B, F, 3, H, W)`, those of a video adjacent."""
    return videos.flatten(0, 1)


def for_each_frame(texts: TextsT, count: int) -> TextsT | list[str]:
    """Return the prompt of each of `count` frames per video; one text, or none, is for all."""
    return texts if texts is None or isinstance(texts, str) else [each for each in texts for _ in range(count)]  # pyright: ignore[reportGeneralTypeIssues]


def mean_of_frames(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the means `(B,)` of the values `(B·F,)` of frames, F of each video."""
    return values.unflatten(0, (-1, count)).mean(1)


def as_strips(images: torch.Tensor) -> torch.Tensor:
    """Return videos `(B, F, 3, H, W)` as images `(B, 3, H, F·W)`, their frames side by side; images stay the same."""
    return images if images.ndim == 4 else torch.cat(images.unbind(1), -1)
