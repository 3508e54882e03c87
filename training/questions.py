"""Questions about pictures: their words, the answers of the judge, and many of them in one sequence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from noiseopt.shapes_world.captions import WORDS, Request, parse
from noiseopt.shapes_world.judge import Thing, describe, see, verdict
from noiseopt.shapes_world.world import OPPOSITE, SIDE

from .negatives import wrong_request

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

PATCHES = 64  # of an image
SHOWS = 'does this figure show "{}" ? please answer yes or no .'
HOLDS = 'is there "{}" in this figure ? please answer yes or no .'
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }} : "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def new_question_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of the words of the world and the questions, which ignores case."""
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


class Seen:
    """Training images, mirrored ones included, with the objects that they show, so that each question has an answer."""

    def __init__(self, images: Tensor, prompts: Sequence[str]) -> None:
        self.images = torch.cat((images, images.flip(-1)))
        self.prompts = [*prompts, *map(mirrored_prompt, prompts)]
        things = [found for part in images.split(256) for found in see(part.float() / 255)]
        self.things = things + [[replace(thing, x=SIDE - thing.x) for thing in found] for found in things]

    def question(self, row: int, rng: random.Random) -> Request:
        """Return a request that an image fulfills or nearly does: its prompt or its content, possibly changed."""
        request = parse(self.prompts[row])
        if rng.random() < 0.4:
            request = seen_request(self.things[row]) or request
        return request if rng.random() < 0.4 else wrong_request(request, rng)

    def ask(self, row: int, rng: random.Random, own: float = 0.5) -> tuple[str, int]:
        """Return a question and its answer, 0 or 1: does the image show exactly a request, or contain it?

        A share `own` of the questions is about the image's own prompt, as in later use.
        """
        asks_own = rng.random() < own
        request = parse(self.prompts[row]) if asks_own else self.question(row, rng)
        answer = verdict(self.things[row], request)
        if asks_own or rng.random() < 0.6:
            return SHOWS.format(request), int(answer.correct)
        return HOLDS.format(request), int(answer.lenient)


def mirrored_prompt(prompt: str) -> str:
    """Return the prompt of the mirror image."""
    request = parse(prompt)
    sideways = request.relation in ("left of", "right of")
    return str(Request(request.objects, OPPOSITE[str(request.relation)]) if sideways else request)


def seen_request(things: Sequence[Thing]) -> Request | None:
    """Return the content of an image as a request, if it is one."""
    try:
        return parse(describe(things))
    except ValueError:
        return None
