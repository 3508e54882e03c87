"""The color-channel reward on images whose score is known."""

import pytest
import torch

from noiseopt.rewards import AutoReward, ColorChannel


@pytest.mark.parametrize(("index", "name"), [(0, "red"), (1, "green"), (2, "blue")])
def test_pure_colors_reach_both_ends_of_the_range(index: int, name: str):
    reward = AutoReward.from_pretrained(name)
    pure = torch.zeros(1, 3, 4, 4)
    pure[:, index] = 1
    assert reward(pure).item() == 1
    assert reward(1 - pure).item() == -2
    assert reward.range == (-2.0, 1.0)
    assert not reward.requires_prompt


def test_formula_and_gradient():
    images = torch.rand(2, 3, 5, 7, requires_grad=True)
    scores = ColorChannel("green")(images)
    red, green, blue = images.unbind(1)
    torch.testing.assert_close(scores, (green - red - blue).mean((1, 2)))
    scores.sum().backward()
    expected = torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(2, 3, 5, 7) / 35
    torch.testing.assert_close(images.grad, expected)


def test_refuses_other_channels():
    with pytest.raises(ValueError, match="Expected a channel out of .*'red', 'green', 'blue'.*, but got 'purple'"):
        ColorChannel("purple")
