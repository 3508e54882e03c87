"""Questions about pictures: their words, the answers of the judge, and many of them in one sequence."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from noiseopt.shapes_world.captions import WORDS, Request, parse, plural
from noiseopt.shapes_world.judge import Thing, describe, see, verdict
from noiseopt.shapes_world.world import COLORS, KINDS, OPPOSITE, SIDE

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
        ids = tokenizer.convert_tokens_to_ids
        self.colors = {ids(color): color for color in COLORS}
        self.kinds = {ids(word): kind for kind in KINDS for word in (kind, plural(kind))}

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map images (B, 3, H, H) in [0, 1] and K questions about each to logits of answer and end, (B, K, 2, V).

        Also returns the tokens (B, L) and the output of the last layer but one, (B, L, D).
        """
        ids, positions, seen, places = (t.to(images.device) for t in self.sequence(self.tails(asked)))
        mask = torch.zeros(seen.shape, device=images.device).masked_fill(~seen, torch.finfo(torch.float32).min)
        output = model.model(
            input_ids=ids,
            pixel_values=images * 2 - 1,
            attention_mask=mask.expand(len(ids), 1, -1, -1),
            position_ids=positions.expand(len(ids), -1),
            use_cache=False,
            output_hidden_states=True,
        )
        before = torch.stack((places - 1, places), -1).flatten(1)
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        logits = model.lm_head(output.last_hidden_state[rows, before])
        return logits.unflatten(1, (-1, 2)), ids, output.hidden_states[-2]

    def targets(self, asked: Sequence[Sequence[tuple[str, int]]]) -> Tensor:
        """Return the target tokens, (B, K, 2): answer and end."""
        return torch.tensor([[[self.answers[answer], self.end] for _, answer in row] for row in asked])

    def named(self, ids: Tensor, things: Sequence[Sequence[Thing]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return where tokens (B, L) name an object, (N, 2), how many the image shows, at most 3, (N,), and where.

        The last is the mean position of these in [0, 1], (N, 2), 0 if there is none.
        """
        places, counts, centers = [], [], []
        for i, row in enumerate(ids.tolist()):
            for j, (before, word) in enumerate(itertools.pairwise(row), 1):
                if before in self.colors and word in self.kinds:
                    named = (self.colors[before], self.kinds[word])
                    found = torch.tensor([(t.x, t.y) for t in things[i] if (t.color, t.kind) == named]).view(-1, 2)
                    places.append((i, j))
                    counts.append(min(len(found), 3))
                    centers.append(found.sum(0) / SIDE / max(1, len(found)))
        return torch.tensor(places), torch.tensor(counts), torch.stack(centers)


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

    def ask(self, row: int, rng: random.Random) -> tuple[str, int]:
        """Return a question and its answer, 0 or 1: does the image show exactly a request, or contain it?

        Half of the questions are about the image's own prompt, as in later use.
        """
        asks_own = rng.random() < 0.5
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
