"""Untrained image encoder and vision-language model from stock classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from noiseopt.shapes_world.captions import OBJECTS, WORDS
from noiseopt.shapes_world.world import LOOKS, SIZE

if TYPE_CHECKING:
    from transformers import Dinov2Model, LlavaForConditionalGeneration, PreTrainedTokenizerFast

PATCH = 8
PATCHES = (SIZE // PATCH) ** 2
SHOWS = 'does this figure show "{}" ? please answer yes or no .'
HOLDS = 'is there "{}" in this figure ? please answer yes or no .'
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }} : "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def new_tower(size: int = SIZE) -> Dinov2Model:
    """Build an untrained DINOv2 encoder: 64 patches of 96 channels, 4 layers."""
    from transformers import Dinov2Config, Dinov2Model

    tower: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 3}
    config = Dinov2Config(**tower, image_size=size, patch_size=size // 8)
    return Dinov2Model(config)


class TowerTraining(nn.Module):
    """The image encoder with training heads: content of each patch, count of each object, occupied patches, ground."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.tower = new_tower(size)
        width = self.tower.config.hidden_size
        self.patch = nn.Linear(width, len(OBJECTS) + 1)
        self.count = nn.Linear(width, 4 * len(OBJECTS))
        self.where = nn.Linear(width, PATCHES)
        self.ground = nn.Linear(width, LOOKS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Map images (B, 3, H, H) in [0, 1] to logits (B, 64, 31), (B, 4, 30), (B, 64), looks and features."""
        tokens = self.tower(pixel_values=images * 2 - 1).last_hidden_state
        whole, patches = tokens[:, 0], tokens[:, 1:]
        counts = self.count(whole).unflatten(1, (4, -1))
        return self.patch(patches), counts, self.where(whole), self.ground(whole), whole


def new_question_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of the words of the world and the questions, in lower case except for the chat roles."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    words = [*WORDS, *f"{SHOWS} {HOLDS}".replace('"{}"', '"').split(), "image"]
    words += ["yes", "no", "user", "assistant", ":", ","]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    split = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=256,
        padding_side="left",
    )


def new_vlm(tokenizer: Any, size: int = SIZE) -> LlavaForConditionalGeneration:
    """Build an untrained LLaVA: a CLIP vision encoder of 4 layers and a Llama of 4 layers, both of width 96."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=size,
        patch_size=size // 8,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


class Questions:
    """Many questions about each image in one sequence: all attend to the image, none to another question.

    The stock model takes such a sequence with a custom mask and positions, and gives the same logits as for one
    question at a time (see the tests), but encodes the image only once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.head = tokenizer("USER : " + "<image>" * PATCHES).input_ids
        self.answers: list[int] = tokenizer.convert_tokens_to_ids(["no", "yes"])
        self.end, self.tokenizer = int(tokenizer.eos_token_id), tokenizer

    def tails(self, asked: Sequence[Sequence[tuple[str, int]]]) -> list[list[list[int]]]:
        """Return the tokens after the image, including the answer, of each question."""
        texts = [[question + " ASSISTANT :" for question, _ in row] for row in asked]
        ids = iter(self.tokenizer([text for row in texts for text in row]).input_ids)
        return [[[*next(ids), self.answers[answer]] for _, answer in row] for row in asked]

    def sequence(self, tails: list[list[list[int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens (B, L), positions (L,), attention mask (L, L), and positions of the answers (B, K)."""
        longest, count, start = max(len(tail) for row in tails for tail in row), len(tails[0]), len(self.head)
        ids = torch.full((len(tails), start + count * longest), int(self.tokenizer.pad_token_id))
        ids[:, :start] = torch.tensor(self.head)
        places = torch.empty(len(tails), count, dtype=torch.long)
        for i, row in enumerate(tails):
            for j, tail in enumerate(row):
                begin = start + j * longest
                ids[i, begin : begin + len(tail)] = torch.tensor(tail)
                places[i, j] = begin + len(tail) - 1
        positions = torch.cat((torch.arange(start), start + torch.arange(longest).repeat(count)))
        block = torch.cat((torch.full((start,), -1), torch.arange(count).repeat_interleave(longest)))
        seen = ((block == -1) | (block == block[:, None])).tril()
        return ids, positions, seen, places

    def __call__(
        self, model: LlavaForConditionalGeneration, images: Tensor, asked: Sequence[Sequence[tuple[str, int]]]
    ) -> Tensor:
        """Map images (B, 3, H, H) in [0, 1] and K questions about each to logits of answer and end, (B, K, 2, V)."""
        ids, positions, seen, places = (t.to(images.device) for t in self.sequence(self.tails(asked)))
        mask = torch.zeros(seen.shape, device=images.device).masked_fill(~seen, torch.finfo(torch.float32).min)
        hidden = model.model(
            input_ids=ids,
            pixel_values=images * 2 - 1,
            attention_mask=mask.expand(len(ids), 1, -1, -1),
            position_ids=positions.expand(len(ids), -1),
            use_cache=False,
        ).last_hidden_state
        before = torch.stack((places - 1, places), -1).flatten(1)
        chosen = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1]))
        return model.lm_head(chosen).unflatten(1, (-1, 2))

    def targets(self, asked: Sequence[Sequence[tuple[str, int]]]) -> Tensor:
        """Return the target tokens, (B, K, 2): answer and end."""
        return torch.tensor([[[self.answers[answer], self.end] for _, answer in row] for row in asked])
