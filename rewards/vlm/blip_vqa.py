"""Probability of an answer about the image by BLIP."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, BlipForQuestionAnswering, PreTrainedTokenizerBase

from ..contract.checkpoints import load_pretrained
from ..contract.image_text import PromptTokens
from ..contract.registry import register_reward
from ..contract.reward import Reward
from ..contract.transforms import ImageTransform, at_least_float32


@register_reward("blip_vqa", loads="BlipForQuestionAnswering")
class BlipVQA(Reward):
    """`exp(mean_i log p(answer_i | answer_<i, question, image))` over the answer's tokens and the end token.

    BLIP: https://arxiv.org/abs/2201.12086. The score equals `exp(-loss)` of transformers' model, per image. The default
    question is that of VQAScore (https://arxiv.org/abs/2404.01291) without "Please answer yes or no.", which BLIP was
    not trained on. T2I-CompBench (https://arxiv.org/abs/2307.06350) uses `question="{}?"` for each noun phrase and
    multiplies the scores. As in transformers, the question begins with [CLS]; the BLIP repository uses [ENC].

    Args:
        model: The BLIP model; it is frozen.
        tokenizer: The tokenizer of the model.
        image_transform: Map from images in [0, 1] to pixels; by default a bicubic resize to the model's square image
            size, normalized with CLIP's mean and standard deviation.
        question: The question, with "{}" for the prompt.
        answer: The answer whose probability is the score.

    Raises:
        ValueError: For a question without "{}", an empty answer, or a tokenizer that does not end texts with the
            model's `sep_token_id`.
    """

    name = "blip_vqa"
    range = (0.0, 1.0)
    license = "bsd-3-clause"
    default_checkpoint = "Salesforce/blip-vqa-base"
    parameter_count = 361_230_140
    model: BlipForQuestionAnswering

    def __init__(
        self,
        model: BlipForQuestionAnswering,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: Callable[[Tensor], Tensor] | None = None,
        question: str = 'Does this figure show "{}"?',
        answer: str = "yes",
    ):
        if "{}" not in question:
            raise ValueError(f"Expected a question with '{{}}' for the prompt, but got {question!r}.")
        super().__init__(model=model)
        edge = cast(int, model.vision_model.config.image_size)
        text_config = model.text_encoder.config
        # BLIP's own code truncates to 35 tokens, which would cut off the end of the question.
        self.tokens = PromptTokens(tokenizer, text_config.max_position_embeddings, padding="longest")
        self.image_transform = image_transform or ImageTransform(size=(edge, edge), crop=None)
        self.question = question
        start, end = cast(int, text_config.bos_token_id), cast(int, text_config.sep_token_id)
        self.answer_ids = blip_answer_ids(tokenizer, answer, start, end)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        # The model's own forward returns one loss for the whole batch.
        pixels = self.image_transform(images).to(self.dtype)
        patches = self.model.vision_model(pixel_values=pixels).last_hidden_state
        questions = [self.question.replace("{}", prompt) for prompt in prompts]
        ids, mask = self.tokens(questions, torch.device("cpu"))
        # One question length at a time, without padding: the decoder of transformers 5.23 ignores the padding mask.
        lengths = mask.sum(1)
        groups = [torch.nonzero(lengths == length)[:, 0] for length in lengths.unique()]
        scores = [
            self.answer_probability(patches[rows], ids[rows][mask[rows].bool()].unflatten(0, (len(rows), -1)))
            for rows in groups
        ]
        return torch.cat(scores)[torch.cat(groups).argsort()]

    def answer_probability(self, patches: Tensor, question_ids: Tensor) -> Tensor:
        """Return the scores (B,) for image features (B, P, D) and question ids (B, L) of equal length."""
        ids = question_ids.to(patches.device)
        question = self.model.text_encoder(input_ids=ids, encoder_hidden_states=patches).last_hidden_state
        answer = torch.tensor(self.answer_ids, device=patches.device).expand(len(patches), -1)
        decoder = self.model.text_decoder
        logits = decoder(input_ids=answer[:, :-1], encoder_hidden_states=question, use_cache=False).logits
        log_probabilities = at_least_float32(logits).log_softmax(-1).gather(-1, answer[:, 1:, None])
        return log_probabilities.mean((1, 2)).exp()

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "BlipVQA":
        model = load_pretrained(BlipForQuestionAnswering, checkpoint, hub)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **hub)
        return cls(model, tokenizer, ImageTransform.from_processor_config(checkpoint, **hub))


def blip_answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str, start: int, end: int) -> list[int]:
    """Tokenize the answer as in the decoder's training: `start` instead of [CLS], the tokens, [SEP].

    Raises:
        ValueError: If the answer has no tokens or does not end with `end`.
    """
    ids = tokenizer(answer)["input_ids"]
    if ids[-1] != end:
        raise ValueError(
            f"Expected the tokenizer to end texts with the model's `sep_token_id` {end}, but got {ids}. Use the "
            "tokenizer of this model."
        )
    if len(ids) < 3:
        raise ValueError(f"Expected an answer of at least one token, but got {answer!r}.")
    return [start, *ids[1:]]
