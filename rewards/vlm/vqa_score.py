"""VQAScore: the probability, by a vision-language model, that an image shows its prompt."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..contract.checkpoints import load_pretrained
from ..contract.registry import register_reward
from ..contract.reward import Reward, RewardT
from ..contract.transforms import at_least_float32
from .vlm_inputs import VLM_FAMILIES, VLMInputs, load_vlm_processor, vlm_family

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
VQAMode = Literal["answer", "answer_eos", "yesno", "logodds"]


@register_reward("vqascore", loads=tuple(VLM_FAMILIES))
class VQAScorer(Reward):
    """Probability of "yes" to `Does this figure show "{prompt}"? Please answer yes or no.` by a vision-language model.

    VQAScore: https://arxiv.org/abs/2404.01291. The modes are functions of the answer's logits, in float32:

    - "answer": the probability, among all tokens, that the answer begins with one of `answers`; in [0, 1].
    - "answer_eos": exp of the mean log-probability of the first of `answers` and the end token, the paper's score for
      CLIP-FlanT5; in [0, 1]. It is about the square root of "answer", so the two are not comparable.
    - "logodds": log P(answers) - log P(negatives), unbounded. It does not saturate, so its gradient is the best
      conditioned one.
    - "yesno": the sigmoid of "logodds", in [0, 1].

    `from_pretrained` uses the mode "answer"; for another, `VQAScorer(reward.model, reward.processor, mode="logodds")`.

    Args:
        model: A model of a type in `VLM_FAMILIES`, or of another type with a `preprocess`; it is frozen.
        processor: Its processor, or a `TokenizerAndImageProcessor`.
        question: The question, with "{}" for the prompt.
        answers: Spellings of yes, also with a leading space, which some models write after "Assistant:". Spellings that
            the tokenizer does not know, or splits into a space and a word, are ignored.
        negatives: Spellings of no, for "yesno" and "logodds".
        mode: The score, see above.
        preprocess: Map from images (B, 3, H, W) in [0, 1] to `pixel_values`, instead of the image processor's.
        prompt_format: The text around the question, with "{}" for it, instead of the chat template.

    Raises:
        ValueError: For an unknown mode or family, a question without "{}", or answers and negatives that begin with the
            same token.
    """

    name = "vqascore"
    range = (0.0, 1.0)
    license = "apache-2.0"
    default_checkpoint = "Qwen/Qwen2-VL-2B-Instruct"
    parameter_count = 2_208_985_600
    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        question: str = QUESTION,
        answers: Sequence[str] = ("Yes", "yes", " Yes", " yes"),
        negatives: Sequence[str] = ("No", "no", " No", " no"),
        mode: VQAMode = "answer",
        preprocess: Callable[[Tensor], Tensor] | None = None,
        prompt_format: str | None = None,
    ):
        if mode not in get_args(VQAMode):
            raise ValueError(f"Expected a mode out of {get_args(VQAMode)}, but got {mode!r}.")
        if "{}" not in question:
            raise ValueError(f"Expected a question with {{}} for the prompt, but got {question!r}.")
        super().__init__(model=model)
        self.processor = processor
        self.inputs = VLMInputs(model, processor, preprocess, prompt_format)
        self.question = question
        self.mode = mode
        self.range = None if mode == "logodds" else (0.0, 1.0)
        self.yes = first_tokens(processor.tokenizer, answers)
        self.no = first_tokens(processor.tokenizer, negatives) if mode in ("yesno", "logodds") else []
        if both := set(self.yes) & set(self.no):
            raise ValueError(
                f"Expected answers {list(answers)} and negatives {list(negatives)} that begin with different tokens, "
                f"but both have {processor.tokenizer.convert_ids_to_tokens(sorted(both))}. Pass others."
            )
        # The tokens of "answer_eos": all of the first answer, and the end token.
        whole = processor.tokenizer(answers[0], add_special_tokens=False)["input_ids"]
        self.whole_answer: list[int] = [*whole, processor.tokenizer.eos_token_id]

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        if self.mode == "answer_eos":
            logits = self.next_logits(images, self.question, prompts, self.whole_answer[:-1])
            chosen = torch.tensor(self.whole_answer, device=logits.device).expand(len(images), -1)
            return logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0].mean(-1).exp()
        logits = self.next_logits(images, self.question, prompts)[:, 0]
        if self.mode == "answer":
            return log_probability(logits, self.yes).exp()
        odds = logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)
        return odds.sigmoid() if self.mode == "yesno" else odds

    def check_size(self, prompt: str, height: int, width: int) -> None:
        self.inputs(self.question, prompt, (height, width))

    def answer_log_probability(
        self, images: Tensor, questions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> Tensor:
        """Return the log-probabilities (B,) that the answers to questions about images begin with given spellings.

        Args:
            images: (B, 3, H, W) in [0, 1].
            questions: B questions.
            answers: B lists of spellings of the accepted answer.
        """
        logits = self.next_logits(images, "{}", questions)[:, 0]
        tokens = [first_tokens(self.processor.tokenizer, variants) for variants in answers]
        return torch.cat([log_probability(row[None], ids) for row, ids in zip(logits, tokens, strict=True)])

    def next_logits(self, images: Tensor, template: str, prompts: Sequence[str], forced: Sequence[int] = ()) -> Tensor:
        """Return the logits (B, 1 + forced, V) of the first answer token and of those after each `forced` token."""
        size = (images.shape[-2], images.shape[-1])
        inputs = [self.inputs(template, prompt, size) for prompt in prompts]
        chunks, order = [], []
        for rows in rows_of_equal_shape(inputs):
            stacked = {name: torch.cat([inputs[row][name] for row in rows]) for name in inputs[rows[0]]}
            chunks.append(self.answer_logits(images[rows], stacked, forced))
            order += rows
        return torch.cat(chunks)[torch.tensor(order).argsort()]

    def answer_logits(self, images: Tensor, inputs: Mapping[str, Tensor], forced: Sequence[int]) -> Tensor:
        """Compute `next_logits` for inputs of equal length, which need no padding."""
        arguments: dict[str, Any] = {name: value.to(self.device) for name, value in inputs.items()}
        text = getattr(self.model.config, "text_config", self.model.config)
        if text.is_encoder_decoder:
            written = torch.tensor([[text.decoder_start_token_id, *forced]], device=self.device)
            arguments["decoder_input_ids"] = written.expand(len(images), -1)
        else:
            arguments = appended(arguments, forced, self.inputs.family.answer_type)
        if "logits_to_keep" in self.inputs.accepted:
            arguments["logits_to_keep"] = 1 + len(forced)
        pixels = self.inputs.pixels(images).to(self.dtype)
        logits = self.model(pixel_values=pixels, use_cache=False, **arguments).logits
        return at_least_float32(logits[:, -1 - len(forced) :])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VQAScorer":
        """Move and cast the weights, but keep float32 buffers when the weights become half precision.

        Rotary frequencies with bfloat16's 8 bits of precision give wrong angles after a few hundred tokens.
        """
        exact = {name: value for name, value in self.named_buffers() if value.is_floating_point()}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            parent, _, leaf = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved.dtype.itemsize < value.dtype.itemsize and moved.dtype != torch.float32:
                self.get_submodule(parent)._buffers[leaf] = value.to(moved.device)
        return self

    @classmethod
    def load(cls: type[RewardT], checkpoint: str, hub: dict[str, Any]) -> RewardT:
        vlm_family(
            PretrainedConfig.get_config_dict(checkpoint, **hub)[0].get("model_type", "")
        )  # fails before weights are loaded
        model = load_pretrained(cast(Any, AutoModelForImageTextToText), checkpoint, hub)
        return cast(Any, cls)(model, load_vlm_processor(checkpoint, model.config, hub))


def rows_of_equal_shape(inputs: Sequence[Mapping[str, Tensor]]) -> Iterator[list[int]]:
    """Yield groups of indices of inputs that can be stacked."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for row, each in enumerate(inputs):
        groups.setdefault(tuple(value.shape for value in each.values()), []).append(row)
    yield from groups.values()


def appended(inputs: Mapping[str, Tensor], tokens: Sequence[int], answer_type: int) -> dict[str, Tensor]:
    """Append answer tokens to the inputs (B, length) of a decoder."""
    ends = {"input_ids": torch.tensor(tokens, dtype=torch.long), "attention_mask": torch.ones(len(tokens))}
    ends |= {"token_type_ids": torch.full((len(tokens),), answer_type), "mm_token_type_ids": torch.zeros(len(tokens))}
    longer = dict(inputs)
    for name in ends.keys() & inputs.keys():
        end = ends[name].to(inputs[name]).expand(len(inputs[name]), -1)
        longer[name] = torch.cat((inputs[name], end), 1)
    return longer


def log_probability(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the log-probability (B,), at most 0, of any of `tokens` under (B, V) logits."""
    return logits.log_softmax(-1)[:, tokens].logsumexp(-1).clamp(max=0)


def first_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Return the distinct first tokens of words.

    Words that the tokenizer does not know are ignored, and so are words whose first token is only white space, which
    could precede the opposite answer as well.

    Raises:
        ValueError: If no word is left, or for a string instead of a list.
    """
    if isinstance(words, str):
        raise ValueError(f"Expected a list of answers, but got the string {words!r}. Pass [{words!r}].")
    begins = [tokenizer(word, add_special_tokens=False)["input_ids"][:1] for word in words]
    firsts = dict.fromkeys(ids[0] for ids in begins if ids and ids[0] != tokenizer.unk_token_id)
    known = [token for token in firsts if str(tokenizer.decode([token])).strip()]
    if not known:
        raise ValueError(
            f"Expected at least one of the answers {list(words)} in the model's vocabulary, but it has none of them. "
            "Pass `answers` in its spelling."
        )
    return known
