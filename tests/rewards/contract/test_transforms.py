"""The differentiable preprocessing against the PIL image processors of transformers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, BlipImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil

from noiseopt.rewards import (
    ImageTransform,
    PadTransform,
    center_crop,
    longest_edge_pad,
    normalize,
    resize,
    shortest_edge,
)
from noiseopt.rewards.contract.transforms import first_pass_size

SIZES = [(64, 64), (200, 200), (300, 171), (97, 160), (512, 768)]
CLIP_NORMALIZATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PILLOW = int(PIL.__version__.split(".")[0])
# Pillow rounds to uint8 after each pass: 1/2, times the sum of the absolute bicubic weights (5/4 at most), plus 1/2.
ROUNDING = 0.5 * 1.25 + 0.5


def make_image(kind: str, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    if kind == "noise":
        return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "checker":
        return np.repeat((((y // 8 + x // 8) % 2) * 255).astype(np.uint8)[..., None], 3, axis=-1)
    waves = [np.sin(x / 19 + phase) * np.cos(y / 23 - phase) for phase in range(3)]
    return ((np.stack(waves, -1) * 0.5 + 0.5) * 255).astype(np.uint8)


def to_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["noise", "checker", "smooth"])
@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}),
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 80, "width": 63}, resample=2),
        CLIPImageProcessorPil(do_resize=False, crop_size={"height": 90, "width": 91}),
        BlipImageProcessorPil(size={"height": 96, "width": 96}),
        SiglipImageProcessorPil(size={"height": 56, "width": 72}),
    ],
    ids=["clip", "clip-bilinear-padded", "crop-only", "blip-squash", "siglip-squash"],
)
def test_equals_the_pil_processor_to_its_rounding(processor, kind: str, size: tuple[int, int]):
    image = make_image(kind, *size)
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    transform = ImageTransform.from_processor_config(processor.to_dict())
    ours = transform(to_batch(image))
    assert ours.shape == theirs.shape
    if isinstance(transform.size, tuple) and first_pass_size(*size, transform.size)[0] != size[0] and PILLOW < 13:
        pytest.skip("Before version 13 Pillow always resized the width first")
    grey_levels = (ours - theirs).abs() * 255 * torch.tensor(processor.image_std)[:, None, None]
    assert grey_levels.max() < ROUNDING + 0.001
    assert grey_levels.mean() < 0.4


def test_a_single_pass_is_plain_interpolation_and_overshoots():
    images = to_batch(make_image("checker", 200, 200))
    transform = ImageTransform(size=112, crop=None, mean=None, std=None)
    once = dataclasses.replace(transform, single_pass=True)(images)
    assert torch.equal(once, F.interpolate(images, (112, 112), mode="bicubic", antialias=True))
    assert once.max() > 1.01
    assert transform(images).max() <= 1 + 1e-6


def test_saturated_pixels_keep_their_gradient():
    """A white image resizes to 1 plus or minus a rounding error, and an overshoot lies outside of [0, 1]."""
    for value in (0.0, 1.0, 1.04, -0.04):
        images = torch.full((1, 3, 128, 128), value, requires_grad=True)
        ImageTransform(size=56, crop=(56, 56))(images).sum().backward()
        assert images.grad is not None
        expected = 3 * 56 * 56 / torch.tensor([0.26862954, 0.26130258, 0.27577711]).mean()
        assert images.grad.sum() == pytest.approx(float(expected), rel=0.01)
        assert images.grad.min() > 0


def test_gradient_of_the_transform_matches_finite_differences():
    images = torch.rand(1, 3, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    assert torch.autograd.gradcheck(ImageTransform(size=6, crop=(6, 6)), images.requires_grad_())


def test_half_precision_images_are_resized_in_float32():
    images = torch.rand(1, 3, 40, 40)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(resize(images.to(dtype), (16, 16)), resize(images.to(dtype).float(), (16, 16)))


def test_the_long_side_is_truncated():
    assert shortest_edge(300, 171, 112) == (196, 112)
    assert shortest_edge(171, 300, 112) == (112, 196)
    assert shortest_edge(50, 50, 112) == (112, 112)


def test_longest_edge_pad_centers_the_image_on_black():
    padded = longest_edge_pad(torch.ones(1, 3, 40, 80), 32)
    assert padded.shape == (1, 3, 32, 32)
    torch.testing.assert_close(padded[..., 8:24, :], torch.ones(1, 3, 16, 32))
    assert not padded[..., :8, :].any() and not padded[..., 24:, :].any()


def test_pad_transform_is_the_padding_and_clips_normalization():
    images = to_batch(make_image("checker", 97, 160))
    expected = normalize(longest_edge_pad(images, 56), *CLIP_NORMALIZATION)
    assert torch.equal(PadTransform(56)(images), expected)
    assert torch.equal(PadTransform(56)(images.half()), PadTransform(56)(images.half().float()))


def test_in_reno_every_transform_crops_in_one_unclamped_pass():
    cropping = ImageTransform(size=56, crop=(56, 56))
    assert PadTransform(56).as_in_reno() == cropping.as_in_reno() == dataclasses.replace(cropping, single_pass=True)


def test_normalize_and_center_crop():
    images = torch.arange(5.0).expand(1, 3, 5, 5)
    assert torch.equal(center_crop(images, (3, 2))[0, 0, 0], torch.tensor([1.0, 2.0]))
    assert torch.equal(normalize(images, [1, 0, 0], [2, 1, 1])[0, :2, 0, 3], torch.tensor([1.0, 3.0]))


def test_reads_old_and_new_settings():
    assert ImageTransform.from_processor_config({}) == ImageTransform()
    assert ImageTransform.from_processor_config({"size": 64, "crop_size": 64}) == ImageTransform(size=64, crop=(64, 64))
    assert ImageTransform.from_processor_config({"do_normalize": False, "do_center_crop": False}) == ImageTransform(
        crop=None, mean=None, std=None
    )


# As published: settings that are left out, or an integer size, mean what the class of the processor says.
CHECKPOINTS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": 56},
    "swin": {"image_processor_type": "ViTImageProcessor", "size": {"height": 56, "width": 56}},
    "deit": {"image_processor_type": "DeiTImageProcessor", "size": 64, "crop_size": 56, "resample": 3},
    "beit": {"image_processor_type": "BeitImageProcessor", "size": 56, "crop_size": 56, "do_center_crop": False},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": 56, "crop_pct": 0.875},
    "resnet": {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 56},
    "convnext-384": {"image_processor_type": "ConvNextImageProcessor", "size": 384},
    "levit": {"image_processor_type": "LevitImageProcessor", "size": 56, "crop_size": 56},
    "poolformer": {"image_processor_type": "PoolFormerImageProcessor", "size": 56, "crop_size": 56, "crop_pct": 0.9},
    "mobilenet": {"image_processor_type": "MobileNetV2ImageProcessor", "size": 64, "crop_size": 56},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 64}, "crop_size": 56},
    "not rescaled": {"image_processor_type": "BitImageProcessor", "do_rescale": False},
    "not normalized": {"image_processor_type": "BitImageProcessor", "do_rescale": False, "do_normalize": False},
}


@pytest.mark.parametrize("size", [(512, 512), (480, 640), (97, 60)], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_transform_of_a_checkpoint_gives_the_pixels_of_its_own_processor(name, size, tmp_path: Path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CHECKPOINTS[name]))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    transform, image = ImageTransform.from_processor_config(tmp_path), make_image("noise", *size)
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours = transform(to_batch(image))
    assert ours.shape == theirs.shape
    height = 1 if transform.std is None else torch.tensor(transform.std)[:, None, None]
    assert ((ours - theirs) * height * 255).abs().max() < ROUNDING + 0.15


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        *{
            "BridgeTower": "`crop_size` to be an int or",
            "Chameleon": "`resample` to be 2",
            "Detr": "`size` to be an int",
            "Idefics": "IdeficsImageProcessorPil to make `pixel_values` of an image, but it fails with ",
            "Sam2": "an image processor to compare with, but got: Could not load any image processor class",
            "SuperGlue": "SuperGlueImageProcessorPil to make `pixel_values` of an image, but it fails with ValueError",
            "VitMatte": "VitMatteImageProcessorPil to make `pixel_values` of an image, but it fails with TypeError",
        }.items()
    ],
)
def test_a_processor_that_cannot_be_compared_is_refused(kind, reason, tmp_path: Path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": f"{kind}ImageProcessor"}))
    with pytest.raises(ValueError, match=f"Expected .*{reason}.*`image_transform="):
        ImageTransform.from_processor_config(tmp_path)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path):
    settings = {"image_processor_type": "Theirs", "auto_map": {"AutoImageProcessor": "theirs.Theirs"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="Expected an image processor to compare with, but got: .*custom code"):
        ImageTransform.from_processor_config(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_mean_may_be_one_number():
    transform = ImageTransform.from_processor_config({"image_mean": 0.5, "image_std": 0.25})
    assert transform == ImageTransform(mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize("kind", ["MobileViT", "EfficientNet", "Perceiver", "VideoMAE", "Siglip2"])
def test_a_processor_whose_pixels_differ_is_refused_with_both_shapes(kind, tmp_path: Path):
    """Such as one that swaps the channels, subtracts an offset, crops first, or cuts patches."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": f"{kind}ImageProcessor"}))
    expected = f"Expected the pixels of {kind}ImageProcessor.*, but ours, .* differ by .* Load the model yourself"
    with pytest.raises(ValueError, match=expected):
        ImageTransform.from_processor_config(tmp_path)


def test_dinov3_resizes_what_is_rescaled(tmp_path: Path):
    """Its processor needs torchvision: rescale, resize with antialiasing, normalize, in this order."""
    settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_center_crop": None, "crop_size": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    image = to_batch(make_image("noise", 300, 171))
    resized = F.interpolate(image, (224, 224), mode="bilinear", antialias=True)
    expected = (resized - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(ImageTransform.from_processor_config(tmp_path)(image), expected, rtol=1e-4, atol=1e-4)


def test_refuses_what_it_cannot_reproduce(tmp_path: Path):
    with pytest.raises(ValueError, match="Expected the image processor's `size`.*longest_edge"):
        ImageTransform.from_processor_config({"size": {"longest_edge": 10}})
    with pytest.raises(ValueError, match="`resample` to be 2 .bilinear. or 3 .bicubic., but got 1"):
        ImageTransform.from_processor_config({"resample": 1})
    with pytest.raises(OSError):
        ImageTransform.from_processor_config(tmp_path)
