"""Tiny rewards of SigLIP's kind: the real classes, with random weights."""

import functools
import string
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_clip_rewards import randomized
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessorPil, SiglipModel

from noiseopt.rewards import Reward, SigLIP, SigLIP2

EOS, UNKNOWN, PAD = 1, 2, 0


def build_siglip_tokenizer(version: int = 1) -> PreTrainedTokenizerFast:
    """One token per character. The first version pads with its end token, the second as Gemma does."""
    eos, pad = ("</s>", "</s>") if version == 1 else ("<eos>", "<pad>")
    tokens = ["<pad>", eos, "<unk>", "\u2581", *string.ascii_lowercase, *string.punctuation]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {eos}", special_tokens=[(eos, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, unk_token="<unk>", model_max_length=16
    )


def build_siglip_model(seed: int = 5) -> SiglipModel:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    config = SiglipConfig(
        text_config={**tower, **special, "vocab_size": 64, "max_position_embeddings": 16},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )
    model = randomized(lambda: SiglipModel(config), seed=seed)
    # As trained: exp(4.7) is 112.
    model.logit_scale.data, model.logit_bias.data = torch.tensor([4.7]), torch.tensor([-16.5])
    return model


def build_siglip(reward_class: type[SigLIP] = SigLIP, version: int = 1, seed: int = 5) -> SigLIP:
    return reward_class(build_siglip_model(seed), build_siglip_tokenizer(version))


def publish_siglip(
    root: Path, folder: str = "google/siglip-so400m-patch14-384", version: int = 1, seed: int = 5
) -> None:
    build_siglip_model(seed).save_pretrained(root / folder)
    build_siglip_tokenizer(version).save_pretrained(root / folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / folder)


build_siglip2 = functools.partial(build_siglip, SigLIP2, version=2, seed=6)
publish_siglip2 = functools.partial(publish_siglip, folder="google/siglip2-so400m-patch14-384", version=2, seed=6)

TINY_SIGLIP_REWARDS: dict[str, Callable[[], Reward]] = {"siglip": build_siglip, "siglip2": build_siglip2}
PUBLISHED_SIGLIP_REWARDS: dict[str, Callable[[Path], None]] = {"siglip": publish_siglip, "siglip2": publish_siglip2}
