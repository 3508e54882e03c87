"""The tokenizer of the shapes world: a valid CLIP tokenizer with one token per word of the world."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from noiseopt.shapes_world.captions import WORDS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 16


def new_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer; other words fall back to letters.

    Merges join each word from the left, longer words first: otherwise "red" would join the r and e of "green" too
    early.
    """
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in sorted(set(WORDS), key=lambda word: (-len(word), word)):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            pair = ("".join(pieces[:i]), pieces[i])
            if pair not in merges:
                merges.append(pair)
    tokens += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    # transformers annotates merges as strings but also accepts pairs
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)  # pyright: ignore[reportArgumentType]


def text_options(tokenizer: CLIPTokenizer) -> dict:
    """Return the options shared by the text encoders of the reward and the generators."""
    return {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
