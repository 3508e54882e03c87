"""The embedded vision-language model as a reward: the probability of "yes" to whether a picture shows its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .embedded import path
from .readers import SHOWS


class YesNo:
    """P("yes") of `Does this figure show "{prompt}"? Please answer yes or no.`, as VQAScore has it.

    https://arxiv.org/abs/2404.01291. A reward like any other: `(images, prompts) -> (B,)` in [0, 1], differentiable.

    Args:
        folder: The model's folder; by default the embedded one.
    """

    name = "vqa"
    range = (0.0, 1.0)

    def __init__(self, folder: str | None = None) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from ..rewards.transforms import ImageTransform

        folder = folder or path("vqa")
        self.model = AutoModelForImageTextToText.from_pretrained(folder).requires_grad_(False).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.transform = ImageTransform.from_processor_config(folder)
        self.yes = int(self.processor.tokenizer.convert_tokens_to_ids("yes"))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts -> (B,)."""
        tokenizer = self.processor.tokenizer
        inputs = tokenizer([self.text(prompt) for prompt in prompts], padding=True, return_tensors="pt")
        logits = self.model(
            input_ids=inputs.input_ids.to(images.device),
            attention_mask=inputs.attention_mask.to(images.device),
            pixel_values=self.transform(images),
        ).logits
        return logits[:, -1].float().softmax(-1)[:, self.yes]

    def text(self, prompt: str) -> str:
        """The chat that asks about a prompt, with one token for each patch of the picture."""
        content = [{"type": "image"}, {"type": "text", "text": SHOWS.format(prompt)}]
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        image = self.model.config.image_seq_length
        return text.replace("<image>", "<image>" * image)
