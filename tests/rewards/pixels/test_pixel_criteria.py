"""Brightness and JPEG size against Pillow and DDPO's formula."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from noiseopt.rewards import AutoReward, Brightness, JPEGCompressibility, JPEGIncompressibility


def grey_levels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8, smooth enough that its size as a JPEG is not that of noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7 + k + seed) * np.cos(y / 5 - k) for k in range(3)], -1)
    return ((waves * 0.5 + 0.5) * 255).astype(np.uint8)


def to_batch(*arrays: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays]).float() / 255


def saved_size(array: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue())


@pytest.mark.parametrize(
    ("color", "luma"), [((1, 0, 0), 0.299), ((0, 1, 0), 0.587), ((0, 0, 1), 0.114), ((1, 1, 1), 1)]
)
def test_brightness_of_pure_colors(color: tuple[int, int, int], luma: float):
    images = torch.tensor(color, dtype=torch.float32)[None, :, None, None].expand(1, 3, 5, 7)
    assert Brightness()(images).item() == pytest.approx(luma)
    assert Brightness()(1 - images).item() == pytest.approx(1 - luma, abs=1e-6)


def test_brightness_is_the_mean_of_pillows_gray_image():
    arrays = grey_levels(31, 45), grey_levels(31, 45, seed=2)
    theirs = [np.asarray(Image.fromarray(array).convert("L"), dtype=float).mean() / 255 for array in arrays]
    # Pillow rounds each pixel to a gray level.
    assert Brightness()(to_batch(*arrays)).tolist() == pytest.approx(theirs, abs=0.5 / 255)


def test_brightness_has_the_weights_as_its_gradient():
    images = torch.rand(2, 3, 4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(Brightness()(images).sum(), images)
    expected = torch.tensor([0.299, 0.587, 0.114])[:, None, None].expand(2, 3, 4, 5) / 20
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("size", [(8, 8), (37, 61), (64, 64)], ids=str)
def test_jpeg_size_is_that_of_a_saved_file_in_kilobytes(size: tuple[int, int]):
    arrays = grey_levels(*size), grey_levels(*size, seed=1)
    expected = [saved_size(array) / 1000 for array in arrays]
    images = to_batch(*arrays)
    assert JPEGIncompressibility()(images).tolist() == pytest.approx(expected, rel=1e-6)
    assert JPEGCompressibility()(images).tolist() == pytest.approx([-size for size in expected], rel=1e-6)


def test_pixels_are_rounded_and_clipped_as_ddpo_does():
    """`(images * 255).round().clamp(0, 255)`: 0.49 gray levels away is the same file, 0.51 is not."""
    array = grey_levels(40, 40)
    images = to_batch(array)
    reward = JPEGIncompressibility()
    assert torch.equal(reward(images + 0.49 / 255), reward(images))
    moved = np.minimum(array.astype(int) + 1, 255).astype(np.uint8)
    assert reward(images + 0.51 / 255).item() == pytest.approx(saved_size(moved) / 1000)


def test_noise_compresses_worse_than_a_flat_image():
    flat = torch.full((1, 3, 64, 64), 0.5)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = AutoReward.from_pretrained("jpeg_compressibility")(torch.cat([flat, noise]))
    assert scores[0] > 4 * scores[1]
    assert not AutoReward.from_pretrained("jpeg_incompressibility").differentiable
