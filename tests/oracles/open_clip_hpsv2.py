"""A tiny HPSv2 by open_clip and torchvision, with whose values `tests/rewards/preference/test_hpsv2.py` compares ours.

torchvision must not be installed beside the tests (see CONTRIBUTING.md), so this runs in an environment of its own:

    python -m venv oracle
    oracle/bin/pip install torch==2.13.0 numpy safetensors huggingface_hub==2.4.0 ftfy regex tqdm pillow pyyaml
    oracle/bin/pip install --no-deps open_clip_torch==3.3.0 torchvision==0.28.0 timm
    oracle/bin/python tests/oracles/open_clip_hpsv2.py tests/rewards/preference/data/open_clip_hpsv2.safetensors

It holds, each under a prefix: `state.` the weights of a CLIP as HPSv2 publishes them, in float16; `image.` pixels of
several sizes, uint8; `pixels.` the same as HPSv2 preprocesses them; `ids`; `image_features` and `text_features`, unit
vectors; `scores`. In its metadata: `prompts` with the ids open_clip gives them, and the part of the vocabulary
that they need.
"""
# pyright: reportMissingImports=false

import json
import sys

import torch
from safetensors.torch import save_file

# The wheel of torchvision that pip finds is built for CUDA, and beside a CPU torch two operators are missing at import.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, operator):
        LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
from open_clip.model import CLIP  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode  # noqa: E402
from torchvision.transforms import functional  # noqa: E402

EDGE = 32
SIZES = [(20, 90), (40, 56), (48, 48), (57, 33)]  # (height, width), as the file sorts them
PROMPTS = [
    "a red cube on a table",
    "A  Photo\tof TWO  cats ",
    "Tom &amp; Jerry &lt;3",
    "it's 3:15, isn't it?",
    "a dog\u2019s \u201cbig\u201d day",
    "caf\u00e9 \u4e2d\u6587 \U0001f600",
    "cafe\u0301 \ufb01sh \uff26ull",
    "schÃ¶n",
]


def build_model() -> CLIP:
    """ViT-H-14 in small: GELU, heads of another width than the text's, float16 weights."""
    torch.manual_seed(0)
    vision = {"image_size": EDGE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 54, "width": 32, "heads": 2, "layers": 2}
    model = CLIP(16, vision, text, quick_gelu=False).eval()
    for parameter in model.parameters():
        values = 0.15 * torch.randn_like(parameter) if parameter.ndim else torch.tensor(4.6052)
        parameter.data = values.half().float()
    return model


def preprocess(image: torch.Tensor) -> torch.Tensor:
    """The validation transform of HPSv2: to tensor, longest edge, black padding, normalization."""
    image = image.float() / 255
    scale = EDGE / float(max(image.shape[1:]))
    height, width = (round(side * scale) for side in image.shape[1:])
    image = functional.resize(image, [height, width], functional.InterpolationMode.BICUBIC, antialias=True)
    rows, columns = EDGE - height, EDGE - width
    padding = [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2]
    image = functional.pad(image, padding, fill=0)
    return functional.normalize(image, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def tokenizer_part(tokenizer: SimpleTokenizer) -> dict[str, object]:
    """The prompts' ids, and the tokens and merges that spell words of theirs: dropping others changes no id."""
    texts = [tokenizer.clean_fn(prompt) for prompt in PROMPTS]
    spelled = " ".join("".join(tokenizer.byte_encoder[byte] for byte in text.encode()) for text in texts)
    ranked = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    merges = [pair for pair in ranked if "".join(pair).removesuffix("</w>") in spelled]
    letters = [letter + end for letter in bytes_to_unicode().values() for end in ("", "</w>")]
    tokens = [*letters, *("".join(pair) for pair in merges), "<start_of_text>", "<end_of_text>"]
    return {
        "prompts": [[prompt, ids[ids != 0].tolist()] for prompt, ids in zip(PROMPTS, tokenizer(PROMPTS), strict=True)],
        "vocab": {token: tokenizer.encoder[token] for token in tokens},
        "merges": merges,
    }


@torch.no_grad()
def main(path: str) -> None:
    model = build_model()
    images = {f"image.{h}x{w}": torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in SIZES}
    images |= {f"image.{h}x{w}": (images[f"image.{h}x{w}"] > 127).to(torch.uint8) * 255 for h, w in SIZES[1:2]}
    pixels = {key.replace("image.", "pixels."): preprocess(image) for key, image in images.items()}
    texts = [[5, 30, 7], [40], list(range(2, 16)), []]  # between the start token 0 and the end token 53
    ids = torch.tensor([[0, *text, 53] + [0] * (14 - len(text)) for text in texts])
    image_features, text_features, _ = model(torch.stack([*pixels.values()]), ids)
    features = {"image_features": image_features, "text_features": text_features, "ids": ids}
    state = {f"state.{key}": value.half() for key, value in model.state_dict().items()}
    scores = {"scores": (image_features * text_features).sum(-1)}
    tensors = {key: value.contiguous() for key, value in {**state, **images, **pixels, **features, **scores}.items()}
    text = json.dumps(tokenizer_part(SimpleTokenizer()))
    save_file(tensors, path, {"open_clip": open_clip.__version__, "text": text})


if __name__ == "__main__":
    main(sys.argv[1])
