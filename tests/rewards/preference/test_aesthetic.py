"""LAION's aesthetic scores: the published networks written down naively, and what a head file must hold."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip_rewards import (
    build_aesthetic,
    build_aesthetic_head,
    build_aesthetic_v1,
    build_tokenizer,
    build_vision_tower,
    publish_aesthetic,
    publish_clip_score,
)
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from noiseopt.rewards import Aesthetic, AestheticHead, AestheticV1, AutoReward, ImageTransform, RewardSum

V2_FILE, V1_FILE = "sac+logos+ava1-l14-linearMSE.pth", "sa_0_4_vit_l_14_linear.pth"


class PublishedHead(nn.Module):
    """The network of christophschuhmann/improved-aesthetic-predictor, dropout included."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def clip_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """CLIP ViT-L/14 in a folder instead of on the Hub."""
    publish_clip_score(tmp_path, "clip", seed=4)
    monkeypatch.setattr("noiseopt.rewards.preference.aesthetic.CLIP_VIT_L", str(tmp_path / "clip"))
    return tmp_path / "clip"


def unit_embeddings(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """As the authors do: a whole CLIP, its PIL processor, an L2 norm."""
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor([image.permute(1, 2, 0).numpy().astype("uint8") for image in images], return_tensors="pt")
    embeddings = CLIPModel.from_pretrained(folder)(**pixels, input_ids=torch.zeros(1, 2, dtype=torch.long)).image_embeds
    return embeddings / embeddings.norm(dim=-1, keepdim=True)


def test_v2_is_the_published_network_on_the_embeddings_of_a_whole_clip(clip_folder: Path):
    pixels = torch.randint(0, 256, (2, 3, 48, 40), generator=torch.Generator().manual_seed(7))
    head = PublishedHead(16).eval()
    head.load_state_dict(build_aesthetic_head().state_dict())
    with torch.no_grad():
        expected = head.layers(unit_embeddings(clip_folder, pixels))[:, 0]
    scores = build_aesthetic()(pixels / 255)
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.03 * expected.abs().max().item())
    # The head exactly, on the same embeddings: the images above differ by the processor's rounding.
    reward = build_aesthetic()
    same = head.layers(reward.encode_image(pixels / 255))[:, 0]
    torch.testing.assert_close(scores, same, rtol=1e-5, atol=1e-6)


def test_v1_is_one_linear_layer(images: torch.Tensor):
    reward = build_aesthetic_v1()
    embeddings = reward.model(pixel_values=reward.image_transform(images)).image_embeds
    embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
    weight, bias = reward.head.state_dict().values()
    torch.testing.assert_close(reward(images), (embeddings * weight[0]).sum(-1) + bias, rtol=1e-5, atol=1e-6)


def test_the_head_of_v2_is_one_linear_map():
    head, x = build_aesthetic_head(), torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    middle = head((0.3 * x[:1]) + 0.7 * x[1:])
    torch.testing.assert_close(middle, 0.3 * head(x[:1]) + 0.7 * head(x[1:]), rtol=1e-4, atol=1e-5)


def test_the_head_works_in_float32_on_half_precision_weights(images: torch.Tensor):
    reward, seen = build_aesthetic().bfloat16(), []
    next(reward.head.children()).register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert reward(images).dtype == torch.float32
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("filename", "name", "build"),
    [(V2_FILE, "aesthetic", build_aesthetic), (V1_FILE, "aesthetic_v1", build_aesthetic_v1)],
)
@pytest.mark.usefixtures("clip_folder")
def test_a_folder_with_the_authors_file_is_known_by_it(
    filename: str, name: str, build: Callable[[], Aesthetic], tmp_path: Path, images: torch.Tensor
):
    reward = build()
    (tmp_path / "head").mkdir()
    torch.save(reward.head.state_dict(), tmp_path / "head" / filename)
    loaded = AutoReward.from_pretrained(tmp_path / "head")
    assert loaded.name == name and type(loaded) is type(reward)
    torch.testing.assert_close(loaded(images), reward(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saved", ["image processor", "whole processor", "no processor"])
@pytest.mark.usefixtures("clip_folder")
def test_a_folder_may_hold_the_vision_tower_too(saved: str, tmp_path: Path, images: torch.Tensor):
    """It is used however it was saved: transformers 5 writes one file for a whole `CLIPProcessor`."""
    folder = tmp_path / "own"
    tower = build_vision_tower(seed=5)
    tower.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    if saved == "image processor":
        processor.save_pretrained(folder)
    elif saved == "whole processor":
        CLIPProcessor(processor, build_tokenizer()).save_pretrained(folder)
        assert not (folder / "preprocessor_config.json").exists()
    torch.save(build_aesthetic_head().state_dict(), folder / V2_FILE)
    loaded = Aesthetic.from_pretrained(str(folder), local_files_only=True)
    expected = Aesthetic(tower, build_aesthetic_head(), ImageTransform(size=32, crop=(32, 32)))
    torch.testing.assert_close(loaded(images), expected(images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(loaded(images), build_aesthetic()(images), rtol=1e-2)


def test_loading_does_not_complain_about_the_half_of_clip_that_is_not_wanted(
    clip_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    publish_aesthetic(tmp_path)
    with caplog.at_level(logging.WARNING, "transformers"):
        logging.getLogger("transformers").propagate, before = True, logging.getLogger("transformers").propagate
        Aesthetic.from_pretrained(str(tmp_path / "ttj/sac-logos-ava1-l14-linearMSE"))
        logging.getLogger("transformers").propagate = before
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text


@pytest.mark.usefixtures("clip_folder")
def test_a_head_of_another_layout_is_refused_by_its_keys(tmp_path: Path):
    state = {f"mlp.{key}": value for key, value in build_aesthetic_head().state_dict().items()}
    (tmp_path / "head").mkdir()
    save_file(state, tmp_path / "head/model.safetensors")
    with pytest.raises(
        ValueError,
        match="model.safetensors .* AestheticHead, but missing: layers.0.bias.*unexpected: mlp.layers",
    ):
        Aesthetic.from_pretrained(str(tmp_path / "head"))
    torch.save(build_aesthetic_v1().head.state_dict(), tmp_path / "head" / V2_FILE)
    with pytest.raises(ValueError, match="sac.logos.* missing: layers.0.bias.*unexpected: bias, weight"):
        Aesthetic.from_pretrained(str(tmp_path / "head"))


def test_v1_says_where_its_weights_are_before_anything_is_loaded():
    expected = f"'aesthetic_v1', whose weights are not on the Hub.* Download {V1_FILE} from the GitHub project LAION-AI"
    for load in (
        lambda: AutoReward.from_pretrained("aesthetic_v1"),
        lambda: AestheticV1.from_pretrained(),
        lambda: RewardSum(["clipscore", "aesthetic_v1"]),
    ):
        with pytest.raises(ValueError, match=expected):
            load()
    with pytest.raises(FileNotFoundError, match=f"Expected the file {V1_FILE} in .*Pass the folder that contains it"):
        AestheticV1.from_pretrained(str(Path(__file__).parent))


def test_parameter_counts_are_those_of_clip_vit_l_14_and_the_heads():
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device("meta"):
        tower = count(CLIPVisionModelWithProjection(config))
        assert Aesthetic.parameter_count == tower + count(AestheticHead())
        assert AestheticV1.parameter_count == tower + count(nn.Linear(768, 1))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
