"""How probable an answer about the image is to BLIP."""

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

    BLIP: https://arxiv.org/abs/2201.12086. It is `exp(-loss)` of transformers' model, per image. The default question
    is VQAScore's (https://arxiv.org/abs/2404.01291) without "Please answer yes or no.", which BLIP was not trained to
    read; T2I-CompBench (https://arxiv.org/abs/2307.06350) asks `question="{}?"` of each noun phrase and takes the
    product. As in transformers the question begins with [CLS]; the BLIP repository puts [ENC] there.

    Args:
        model: the BLIP model; it is frozen.
        tokenizer: the tokenizer of that model.
        image_transform: images in [0, 1] -> its pixels; by default a bicubic resize to the model's square image size
            with CLIP's mean and deviation.
        question: what is asked, with "{}" where the prompt goes.
        answer: the answer whose probability is the score.

    Raises:
        ValueError: a question without "{}", an empty answer, or a tokenizer that does not end texts with the model's
            `sep_token_id`.
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
            raise ValueError(f"Expected a question with '{{}}' where the prompt goes, but got {question!r}.")
        super().__init__(model=model)
        edge = cast(int, model.vision_model.config.image_size)
        text_config = model.text_encoder.config
        # Not cut to the 35 tokens of BLIP's own code: that would take the end of the question.
        self.tokens = PromptTokens(tokenizer, text_config.max_position_embeddings, padding="longest")
        self.image_transform = image_transform or ImageTransform(size=(edge, edge), crop=None)
        self.question = question
        start, end = cast(int, text_config.bos_token_id), cast(int, text_config.sep_token_id)
        self.answer_ids = blip_answer_ids(tokenizer, answer, start, end)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        # Not through the model's own forward: it returns one loss for the whole batch.
        pixels = self.image_transform(images).to(self.dtype)
        patches = self.model.vision_model(pixel_values=pixels).last_hidden_state
        questions = [self.question.replace("{}", prompt) for prompt in prompts]
        ids, mask = self.tokens(questions, torch.device("cpu"))
        # Questions of one length at a time, unpadded: the decoder of transformers 5.23 also reads what is masked.
        lengths = mask.sum(1)
        groups = [torch.nonzero(lengths == length)[:, 0] for length in lengths.unique()]
        scores = [
            self.answer_probability(patches[rows], ids[rows][mask[rows].bool()].unflatten(0, (len(rows), -1)))
            for rows in groups
        ]
        return torch.cat(scores)[torch.cat(groups).argsort()]

    def answer_probability(self, patches: Tensor, question_ids: Tensor) -> Tensor:
        """(B, P, D) image features and (B, L) ids of questions of equal length -> (B,)."""
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
    """The answer as the decoder was trained on it: `start` in place of [CLS], the tokens, [SEP].

    Raises:
        ValueError: an answer without tokens, or one that does not end with `end`.
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
