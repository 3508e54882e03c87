"""Our pixels of vision-language models against those of transformers' PIL image processors."""

import math
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaNextImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

from noiseopt.rewards.vlm.vlm_pixels import lanczos_resize, smart_resize, vlm_pixels

HALF = [0.5, 0.5, 0.5]
# In normalized units; CLIP divides by standard deviations of about 0.26, the others by 0.5: 1.13 gray levels each.
PROCESSORS: list[tuple[Any, float]] = [
    (CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}), 0.017),
    (BlipImageProcessorPil(size={"height": 40, "width": 48}), 0.017),
    (SiglipImageProcessorPil(size={"height": 48, "width": 48}), 0.009),
    (Gemma3ImageProcessorPil(size={"height": 56, "width": 56}), 0.009),
    (GotOcr2ImageProcessorPil(size={"height": 48, "width": 48}), 0.017),
    (Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 84 * 84}), 0.017),
    (Qwen2VLImageProcessorPil(patch_size=16, image_mean=HALF, image_std=HALF, do_resize=True), 0.009),
    (Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 48}), 0.018),
    (SmolVLMImageProcessorPil(size={"longest_edge": 512}, max_image_size={"longest_edge": 128}), 0.018),
]


def pictures() -> dict[str, torch.Tensor]:
    """Sharp images of 256 levels, higher and wider than they are processed to, and smaller."""
    random = torch.Generator().manual_seed(0)
    checker = ((torch.arange(150)[:, None] // 5 + torch.arange(100) // 5) % 2).float().expand(1, 3, 150, 100)
    noise = [torch.randint(0, 256, (1, 3, *size), generator=random) / 255 for size in ((97, 161), (30, 41))]
    return {"checker": checker, "noise": noise[0], "small": noise[1]}


def processed(processor: Any, image: torch.Tensor) -> torch.Tensor:
    picture = Image.fromarray((image[0].permute(1, 2, 0) * 255).round().byte().numpy())
    one_tile = {"do_image_splitting": False} if hasattr(processor, "do_image_splitting") else {}
    return processor(images=[picture], return_tensors="pt", **one_tile)["pixel_values"]


@pytest.mark.parametrize("image", pictures().values(), ids=pictures().keys())
@pytest.mark.parametrize(("processor", "tolerance"), PROCESSORS, ids=lambda value: type(value).__name__)
def test_equal_those_of_the_processor_to_a_gray_level(processor: Any, tolerance: float, image: torch.Tensor):
    expected = processed(processor, image)
    torch.testing.assert_close(vlm_pixels(image, processor), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("processor", "tolerance"), PROCESSORS, ids=lambda value: type(value).__name__)
def test_a_batch_is_its_images_one_after_another(processor: Any, tolerance: float):
    images = torch.rand(3, 3, 60, 90, generator=torch.Generator().manual_seed(1))
    singles = [vlm_pixels(image[None], processor) for image in images]
    torch.testing.assert_close(vlm_pixels(images, processor), torch.cat(singles))


@pytest.mark.parametrize(("processor", "tolerance"), PROCESSORS, ids=lambda value: type(value).__name__)
def test_the_gradient_reaches_every_pixel_that_is_seen(processor: Any, tolerance: float):
    images = torch.rand(1, 3, 60, 60, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(vlm_pixels(images, processor).square().sum(), images)
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.99


def test_smart_resize_is_that_of_transformers():
    theirs = image_processing_pil_qwen2_vl.smart_resize
    for height in range(20, 2400, 67):
        for width in range(20, 2400, 71):
            expected = theirs(height, width, factor=28, min_pixels=3136, max_pixels=1003520)
            assert smart_resize(height, width, 28, 3136, 1003520) == expected
    assert smart_resize(512, 512, 28, 3136, 1003520) == (504, 504)


@pytest.mark.parametrize("size", [(31, 47), (120, 90), (60, 20), (20, 80)])
def test_lanczos_is_that_of_pillow(size: tuple[int, int]):
    image = (torch.rand(1, 3, 60, 80, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    picture = Image.fromarray((image[0].permute(1, 2, 0) * 255).byte().numpy())
    resized = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    expected = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(lanczos_resize(image, size)[0], expected, rtol=0, atol=1.13 / 255)


def test_float64_stays_float64():
    image = torch.rand(1, 3, 60, 90, dtype=torch.float64)
    assert all(vlm_pixels(image, processor).dtype == torch.float64 for processor, _ in PROCESSORS)


def test_a_saturated_image_keeps_its_gradient():
    images = torch.ones(1, 3, 40, 60).requires_grad_()
    for processor, _ in PROCESSORS:
        (gradient,) = torch.autograd.grad(vlm_pixels(images, processor).sum(), images)
        assert gradient.sum().item() > 0 and math.isfinite(gradient.sum().item())


def test_any_resolution_tiles_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"Expected an image processor out of .* got LlavaNextImageProcessor. Pass `pre"
    ):
        vlm_pixels(torch.rand(1, 3, 40, 40), LlavaNextImageProcessorPil())
