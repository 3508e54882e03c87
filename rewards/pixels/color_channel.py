"""Dominance of one color channel: the simplest useful reward."""

from typing import Literal

from torch import Tensor

from ..contract.registry import register_reward
from ..contract.reward import Reward

ColorChannelName = Literal["red", "green", "blue"]
COLOR_CHANNELS: tuple[ColorChannelName, ...] = ("red", "green", "blue")


class ColorChannel(Reward):
    """Mean over the pixels of `x[c] - x[c1] - x[c2]`, one channel minus the two others, in [-2, 1].

    The demonstration criterion of the ReNO slides, https://arxiv.org/abs/2406.04312. No weights, no prompt.

    Args:
        channel: "red", "green" or "blue".

    Raises:
        ValueError: For any other channel.
    """

    requires_prompt = False
    range = (-2.0, 1.0)

    def __init__(self, channel: ColorChannelName):
        if channel not in COLOR_CHANNELS:
            raise ValueError(f"Expected a channel out of {COLOR_CHANNELS}, but got {channel!r}.")
        super().__init__()
        self.name = channel
        self.channel = COLOR_CHANNELS.index(channel)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        means = images.mean((-2, -1))
        return 2 * means[:, self.channel] - means.sum(1)


@register_reward("red")
def red_channel() -> ColorChannel:
    """`ColorChannel("red")`."""
    return ColorChannel("red")


@register_reward("green")
def green_channel() -> ColorChannel:
    """`ColorChannel("green")`."""
    return ColorChannel("green")


@register_reward("blue")
def blue_channel() -> ColorChannel:
    """`ColorChannel("blue")`."""
    return ColorChannel("blue")
