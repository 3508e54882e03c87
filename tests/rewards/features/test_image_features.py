"""Image features against the model of transformers on what its PIL image processor makes of the same pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from noiseopt.rewards import (
    NEVER_TOO_LATE_TRANSFORM,
    CLIPFeatures,
    DINOv2Features,
    DINOv2PatchFeatures,
    ImageFeatures,
    ImageTransform,
)

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 32, "patch_size": 8}
TEXT = TOWER | {"vocab_size": 9, "max_position_embeddings": 4}
PLAIN = ImageTransform(size=None, crop=None, mean=None, std=None)


def random_weights(model):
    """Large ones: with the default initialization all images look alike."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def dinov2():
    return random_weights(Dinov2Model(Dinov2Config(**VISION)))


def clip():
    vision = VISION | {"projection_dim": 16}
    return random_weights(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16)))


def siglip():
    return random_weights(SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints in the published layout."""
    squash = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    crop = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    checkpoints = {
        "dinov2": (dinov2(), BitImageProcessorPil(**crop, image_mean=[0.4] * 3, image_std=[0.3] * 3)),
        "clip": (clip(), CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})),
        "siglip": (siglip(), SiglipImageProcessorPil(**squash)),
    }
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (model, processor) in checkpoints.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: root / name for name in checkpoints}


def pictures(height: int, width: int) -> np.ndarray:
    """(2, H, W, 3) uint8, smooth, in color, and different."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [[np.sin(x / side + phase) * np.cos(y / side - phase) for phase in range(3)] for side in (5, 9)]
    return ((np.stack(waves).transpose(0, 2, 3, 1) * 0.5 + 0.5) * 255).astype(np.uint8)


def as_batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).movedim(-1, 1).float() / 255


def expected(name: str, kind: str, folder: Path, images: np.ndarray) -> torch.Tensor:
    """Features of PIL images by transformers, from classes that name their outputs."""
    processors = {"dinov2": BitImageProcessorPil, "clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}
    processor = processors[name].from_pretrained(folder)
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if name == "dinov2":
            hidden = Dinov2Model.from_pretrained(folder)(pixels).last_hidden_state
            return hidden[:, 0] if kind == "cls" else hidden[:, 1:]
        if name == "siglip":
            output = SiglipModel.from_pretrained(folder).vision_model(pixels)
            return output.pooler_output if kind == "cls" else output.last_hidden_state
        output = CLIPVisionModelWithProjection.from_pretrained(folder)(pixels)
        return output.image_embeds if kind == "cls" else output.last_hidden_state[:, 1:]


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (50, 70)], ids=str)
@pytest.mark.parametrize("kind", ["cls", "patch"])
@pytest.mark.parametrize("name", ["dinov2", "clip", "siglip"])
def test_equals_the_pil_processor_and_the_model(folders, name, kind, size):
    images = pictures(*size)
    theirs = expected(name, kind, folders[name], images)
    ours = ImageFeatures.from_pretrained(folders[name], kind)(as_batch(images))
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    if size == (32, 32) and name != "dinov2":
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        # Pillow rounds resized pixels to gray levels: little beside what the two pictures differ by.
        assert (ours - theirs).norm() < 0.05 * (theirs[0] - theirs[1]).norm()


def test_register_tokens_are_no_patches():
    model = random_weights(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)))
    images = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    hidden = model(images).last_hidden_state
    torch.testing.assert_close(ImageFeatures(model, PLAIN, "patch")(images), hidden[:, 4:])
    torch.testing.assert_close(ImageFeatures(model, PLAIN)(images), hidden[:, 0])
    assert hidden.shape[1] == 1 + 3 + 4 * 5


def test_pooler_is_used_only_without_a_class_token():
    """That of a ViT has no published weights; SigLIP's and a convolutional network's are all there is."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    vit = random_weights(ViTModel(ViTConfig(**VISION)))
    torch.testing.assert_close(ImageFeatures(vit, PLAIN)(images), vit(images).last_hidden_state[:, 0])
    tower = random_weights(SiglipVisionModel(SiglipConfig(vision_config=VISION).vision_config))
    torch.testing.assert_close(ImageFeatures(tower, PLAIN)(images), tower(images).pooler_output)
    torch.testing.assert_close(ImageFeatures(tower, PLAIN, "patch")(images), tower(images).last_hidden_state)
    convolutions = random_weights(ConvNextModel(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)))
    torch.testing.assert_close(ImageFeatures(convolutions, PLAIN)(images), convolutions(images).pooler_output)
    with pytest.raises(ValueError, match="patch tokens, but ConvNextModel has none"):
        ImageFeatures(convolutions, PLAIN, "patch")(images)


def test_gradient_reaches_the_images_and_no_weight(folders):
    features = ImageFeatures.from_pretrained(folders["dinov2"])
    images = as_batch(pictures(64, 64)).requires_grad_()
    features(images)[:, 0].sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.any()
    assert all(parameter.grad is None for parameter in features.parameters())


def test_stays_in_evaluation_mode_and_answers_in_float32(folders):
    features = ImageFeatures.from_pretrained(folders["dinov2"], dtype=torch.bfloat16).train()
    assert not any(module.training for module in features.modules())
    assert features.model.dtype == torch.bfloat16
    assert features(as_batch(pictures(32, 32))).dtype == torch.float32


def test_wrong_arguments_are_refused(folders):
    with pytest.raises(ValueError, match="'cls' or 'patch', but got 'mean'"):
        ImageFeatures.from_pretrained(folders["dinov2"], "mean")
    features = ImageFeatures.from_pretrained(folders["dinov2"])
    for images in (torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
            features(images)
    for bad in (-1.0, 1.2, float("nan")):
        with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
            features(torch.full((1, 3, 8, 8), bad))


BASE = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A small model with the patches and the processor of facebook/dinov2-base."""
    folder = tmp_path_factory.mktemp("base")
    random_weights(Dinov2Model(Dinov2Config(**TOWER, patch_size=14))).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**BASE, **IMAGENET}))
    return str(folder)


def test_dinov2_sees_the_whole_image_in_18_by_18_patches(base: str):
    """Its own processor would crop the center, and the border of an image could not be optimized."""
    features = DINOv2PatchFeatures.from_pretrained(base)
    assert features.image_transform == DINOv2Features.from_pretrained(base).image_transform == NEVER_TOO_LATE_TRANSFORM
    images = as_batch(pictures(200, 310)).requires_grad_()
    found = features(images)
    assert found.shape == (2, 18 * 18, 32)
    (gradient,) = torch.autograd.grad(found.square().sum(), images)
    # 18 patches of 14 pixels are 252 of 256: the last 1.6% are no whole patch
    assert gradient[..., :196, :305].abs().sum(1).bool().float().mean() > 0.999
    cropped = ImageFeatures.from_pretrained(base, "patch")
    (gradient,) = torch.autograd.grad(cropped(images).square().sum(), images)
    assert not gradient[..., :50].any()


def test_released_features_resize_without_antialiasing(base: str):
    features = DINOv2PatchFeatures.from_pretrained(base)
    released = features.as_released()
    images = as_batch(pictures(400, 510))
    resized = torch.nn.functional.interpolate(images * 2 - 1, (256, 256), mode="bilinear") * 0.5 + 0.5
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (resized - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(released.image_transform(images), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        released(images), features.model(expected).last_hidden_state[:, 1:], rtol=1e-3, atol=1e-3
    )
    assert released.model is features.model and features.image_transform == NEVER_TOO_LATE_TRANSFORM
    assert 1e-3 < (features.image_transform(images) - expected).abs().mean() < 0.2


def test_parameter_counts_are_those_of_the_published_configurations():
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPVisionConfig(**large, image_size=224, patch_size=14, projection_dim=768)
    with torch.device("meta"):
        clip = CLIPVisionModelWithProjection(config)
        base = Dinov2Model(Dinov2Config(image_size=518, patch_size=14))
    assert sum(parameter.numel() for parameter in clip.parameters()) == CLIPFeatures.parameter_count
    assert sum(parameter.numel() for parameter in base.parameters()) == DINOv2Features.parameter_count
