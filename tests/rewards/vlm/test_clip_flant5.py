"""CLIP-FlanT5: the released formula, its files key by key, its preprocessing."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_vlm_rewards import build_clip_flant5, build_word_tokenizer, publish_clip_flant5, write_shards
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, T5Config

from noiseopt.rewards import CLIPFlanT5, VQAScorer
from noiseopt.rewards.contract.registry import reward_class_of
from noiseopt.rewards.vlm.clip_flant5 import clip_flant5_projector, pad_to_square, split_clip_flant5, untied_t5

MODEL = "zhiqiulin/clip-flant5-xl"


def expand2square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """LLaVA's padding, restated."""
    edge = max(image.size)
    canvas = Image.new("RGB", (edge, edge), color)
    canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return canvas


def picture(height: int, width: int) -> tuple[torch.Tensor, Image.Image]:
    values = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return values.permute(2, 0, 1)[None] / 255, Image.fromarray(values.numpy())


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "tolerance"), [((40, 57), 0.03), ((57, 40), 0.03), ((32, 21), 1e-4), ((32, 32), 1e-4)]
)
def test_is_the_released_score_restated(size: tuple[int, int], tolerance: float):
    """From PIL through transformers: pad, CLIP, next to last layer without its first token, T5, mean loss.

    Exact where nothing is resized; else Pillow rounds to gray levels, which moves the score of a noisy image by 1%.
    """
    reward, (image, pil) = build_clip_flant5(), picture(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    square = expand2square(pil, tuple(int(255 * mean) for mean in processor.image_mean))
    pixels = processor(images=[square], return_tensors="pt")["pixel_values"]
    patches = reward.projector(reward.vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    chat = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\n"
        'Does this figure show "a red cube"? Please answer yes or no. ASSISTANT: '
    )
    before, after = (reward.tokenizer(part, return_tensors="pt").input_ids for part in chat.split("<image>"))
    words = torch.cat((reward.t5.shared(before), patches, reward.t5.shared(after)), 1)
    labels = reward.tokenizer("Yes", return_tensors="pt").input_ids
    assert labels.shape == (1, 2)
    loss = reward.t5(inputs_embeds=words, attention_mask=torch.ones(words.shape[:2]), labels=labels).loss
    torch.testing.assert_close(reward(image, "a red cube")[0], (-loss).exp(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("size", [(40, 57), (57, 40), (41, 41)], ids=str)
def test_padding_is_that_of_pillow(size: tuple[int, int]):
    image, pil = picture(*size)
    color = (122, 116, 104)
    expected = expand2square(pil, color)
    padded = pad_to_square(image, [value / 255 for value in color])
    mine = Image.fromarray((padded[0].permute(1, 2, 0) * 255).round().byte().numpy())
    assert mine.tobytes() == expected.tobytes()


def test_padding_gets_no_gradient_and_the_image_all_of_it():
    images = torch.rand(1, 3, 20, 30, requires_grad=True)
    (gradient,) = torch.autograd.grad(pad_to_square(images, [0.5] * 3).sum(), images)
    assert torch.equal(gradient, torch.ones_like(images))


def test_files_are_split_key_by_key():
    state = {
        "shared.weight": torch.ones(1),
        "embed_tokens.weight": torch.ones(1),
        "lm_head.weight": torch.ones(2),
        "encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(3),
        "mm_projector.0.weight": torch.ones(4),
        "mm_projector.2.bias": torch.ones(5),
        "vision_tower.vision_tower.vision_model.pre_layrnorm.weight": torch.ones(6),
        "vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.ones(7),
    }
    parts = split_clip_flant5(state)
    block = "encoder.block.0.layer.0.SelfAttention.q.weight"
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert parts["t5"].keys() == {"shared.weight", "lm_head.weight", block} | tied
    assert parts["projector"].keys() == {"0.weight", "2.bias"}
    assert parts["vision"].keys() == {"pre_layrnorm.weight"}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repositories as folders of the working directory, where their ids lead to them."""
    publish_clip_flant5(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / MODEL


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.bin")) for key, value in torch.load(file).items()}


def test_the_output_layer_is_not_the_embedding(published: Path):
    """transformers 5 ties the two in each T5 it builds; Flan-T5's differ."""
    state, loaded = state_of(published), CLIPFlanT5.from_pretrained(MODEL)
    assert not torch.equal(state["lm_head.weight"], state["shared.weight"])
    assert torch.equal(loaded.t5.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(loaded.t5.shared.weight, state["shared.weight"])
    assert loaded.t5.encoder.embed_tokens.weight is loaded.t5.shared.weight
    assert loaded.t5.config.scale_decoder_outputs is False


def test_a_checkpoint_without_the_tower_takes_it_from_its_own_repository(published: Path):
    image, _ = picture(40, 40)
    before = CLIPFlanT5.from_pretrained(MODEL)
    before.vision.save_pretrained(published.parents[1] / "openai/clip-vit-large-patch14-336")
    write_shards({key: value for key, value in state_of(published).items() if "vision" not in key}, published)
    torch.testing.assert_close(CLIPFlanT5.from_pretrained(MODEL)(image, "a cube"), before(image, "a cube"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("mm_projector.2.weight", r"\(projector\).* missing: 2.weight"),
        ("lm_head.weight", r"\(t5\).* missing: lm_head.weight"),
        ("vision_tower.vision_tower.vision_model.pre_layrnorm.bias", r"\(vision\).* missing: pre_layrnorm.bias"),
    ],
)
def test_wrong_keys_are_named(published: Path, wrong: str, message: str):
    state = state_of(published)
    write_shards({key: value for key, value in state.items() if key != wrong}, published)
    with pytest.raises(ValueError, match=message):
        CLIPFlanT5.from_pretrained(MODEL)
    write_shards({**state, "mm_extra.weight": torch.ones(1)}, published)
    with pytest.raises(ValueError, match=r"\(t5\).* unexpected: mm_extra.weight"):
        CLIPFlanT5.from_pretrained(MODEL)


def test_the_larger_size_is_recognised_by_its_type():
    assert (
        reward_class_of({"model_type": "clip_t5", "architectures": ["CLIPT5ForConditionalGeneration"]}, "x")
        is CLIPFlanT5
    )


def test_has_as_many_parameters_as_it_says():
    """Flan-T5 XL, CLIP L/14 at 336 and two linear layers."""
    t5 = T5Config.from_dict(
        {
            "d_model": 2048,
            "d_ff": 5120,
            "d_kv": 64,
            "num_layers": 24,
            "num_heads": 32,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        }
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        modules = (untied_t5(t5), CLIPVisionModel(vision), clip_flant5_projector(1024, 2048))
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    assert counts[0] == 2_849_757_184, "as the card of google/flan-t5-xl says"
    assert sum(counts) == CLIPFlanT5.parameter_count


def test_a_long_prompt_is_cut_as_the_original_cuts():
    reward = build_clip_flant5()
    before, after = reward.text_around_image("a red cube " * 1000)
    assert len(before) + 1 + len(after) == 2048
    whole = reward.tokenizer('\nDoes this figure show "' + "a red cube " * 1000)["input_ids"]
    assert after == whole[: len(after)]


def test_a_tokenizer_without_an_end_is_refused():
    parts = build_clip_flant5()
    with pytest.raises(ValueError, match="Expected a tokenizer that ends texts with '</s>', but 'Yes' became"):
        CLIPFlanT5(parts.vision, parts.projector, parts.t5, build_word_tokenizer())


def test_both_tokens_of_the_answer_count():
    """Not the probability of a first token: about its square root."""
    reward, (image, _) = build_clip_flant5(), picture(32, 32)
    patches = reward.encode_image(image)
    before, after = (reward.t5.shared(torch.tensor(ids)) for ids in reward.text_around_image("a cube"))
    start = torch.tensor([[0, reward.answer[0]]])
    logits = reward.t5(inputs_embeds=torch.cat((before, patches[0], after))[None], decoder_input_ids=start).logits[0]
    p = F.softmax(logits, -1)[[0, 1], reward.answer]
    torch.testing.assert_close(reward(image, "a cube")[0], p.prod().sqrt())
    assert reward.range == VQAScorer.range
