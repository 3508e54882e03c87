"""Plugin of pytest for `diffusers_fast_tests.py`: one of our classes in place of a stock one, and tiny tokenizers."""

import os

import diffusers
import transformers
from tiny_pipelines import tiny_clip_tokenizer, tiny_t5_tokenizer

import noiseopt

STOCK, OURS = os.environ["NOISEOPT_STOCK"], os.environ["NOISEOPT_OURS"]
if OURS != STOCK:
    ours = getattr(noiseopt, OURS)
    if ours.target is None:  # always on: here it is off, as with `steps=0`
        ours.method_of = classmethod(lambda cls, settings: None)
    setattr(
        diffusers.pipelines, OURS, getattr(diffusers, STOCK)
    )  # one test reads the source of `encode_prompt` by name
    setattr(diffusers, STOCK, ours)
T5_CONFIG = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}


def without_download(cls, make):
    """Let a class make its own for names of tiny models that would be downloaded."""
    load = cls.from_pretrained.__func__

    def from_pretrained(kind, name, *args, **kwargs):
        if str(name).startswith("hf-internal-testing/tiny-random"):
            return make()
        return load(kind, name, *args, **kwargs)

    cls.from_pretrained = classmethod(from_pretrained)


without_download(transformers.CLIPTokenizer, tiny_clip_tokenizer)
without_download(transformers.AutoTokenizer, tiny_t5_tokenizer)
without_download(transformers.AutoConfig, lambda: transformers.T5Config(**T5_CONFIG))
