"""Never Too Late for SDXL-Turbo and other one-step models of its kind.

Generated from pipelines/never_too_late_turbo.py by `noiseopt hub build`. Edit the source, not this file.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import html
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import numbers
import os
import platform
import re
import string
import sys
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.activations import GEGLU
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.upsampling import Upsample2D
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ImageProcessingMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
)


# rewards/checkpoints.py


ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def checkpoint_path(checkpoint: str, filename: str, hub: Mapping[str, Any]) -> Path:
    """The file of a folder or a Hub repository, downloaded if need be.

    Args:
        checkpoint: a folder or a Hub id.
        filename: the file in it.
        hub: revision, cache_dir, token and local_files_only, as `Reward.load` gets them.

    Raises:
        OSError: a folder without that file, or a download that fails.
    """
    if not os.path.isdir(checkpoint):
        return Path(hf_hub_download(checkpoint, filename, **hub))
    path = Path(checkpoint) / filename
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the file {filename} in {checkpoint}, but it is not there. Pass the folder that holds it, or a "
            "Hub id."
        )
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a pickled one, in which nothing but tensors is ever executed.

    Raises:
        ValueError: a pickle that holds more than tensors and plain values, a damaged file, or no tensors by name.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"Expected a safetensors file in {path.name}: {error}. Download it again.") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the restricted unpickler stumbles over damaged files in every way
        raise ValueError(
            f"Expected a file of tensors, but {path.name} cannot be read with `weights_only=True`: "
            f"{str(error).partition(chr(10))[0]} Download it again, or convert it to safetensors where you trust it."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(type(key) is str and isinstance(state[key], Tensor) for key in state):
        raise ValueError(f"Expected {path.name} to hold tensors by name, but it holds {type(state).__name__}.")
    return state


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` for anything else."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON in {path.name}, but it cannot be read: {error}. Download it again.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"Expected an object in {path.name}, but got {type(settings).__name__}. Download it again.")
    return settings


def holder_of(filename: str, checkpoint: str, companion: str, hub: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a part is read from that some checkpoints leave to another repository, such as a tokenizer.

    Args:
        filename: the file that shows whether `checkpoint`, a folder, has the part itself.
        checkpoint: a folder or a Hub id; a repository on the Hub is never asked.
        companion: the Hub id of the part otherwise.

    Returns:
        `checkpoint` or `companion`, and the arguments to load from it: a revision is one of the checkpoint alone.
    """
    if os.path.isfile(os.path.join(checkpoint, filename)):
        return checkpoint, dict(hub)
    return companion, {**hub, "revision": None}


def load_pretrained(model_class: type[ModelT], checkpoint: str, hub: Mapping[str, Any]) -> ModelT:
    """A transformers model in float32. What a checkpoint lacks, transformers draws at random and only warns of.

    Raises:
        ValueError: naming the keys that are missing.
    """
    load: Any = model_class.from_pretrained  # whose type does not know that it then gives a pair
    model, found = load(checkpoint, dtype=torch.float32, output_loading_info=True, **hub)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"Expected {checkpoint} to hold all weights of {type(model).__name__}, but missing: {', '.join(missing)}. "
            "Pass the checkpoint of a whole model."
        )
    return model


def check_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """See that `state` holds exactly the weights of `module`, whose own values do not matter: it may be a meta one.

    Raises:
        ValueError: naming the keys that are missing or not expected, or the shapes that differ.
    """
    own = module.state_dict()
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in shapes],
    }
    found = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
    if found:
        raise ValueError(f"Expected {source} to hold exactly the weights of {type(module).__name__}, but {found}.")


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`.

    Raises:
        ValueError: as `check_weights` does.
    """
    check_weights(module, state, source)
    module.load_state_dict(state)


# rewards/frozen_module.py


FrozenT = TypeVar("FrozenT", bound="FrozenModule")


class FrozenModule(nn.Module):
    """A module of frozen parts that stays in evaluation mode: what it gives are measurements.

    Args:
        modules: the parts by name.
    """

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module.requires_grad_(False))
        self.eval()

    def train(self: FrozenT, mode: bool = True) -> FrozenT:
        """Stay in evaluation mode: the dropout of a scoring head would make the scores random."""
        return super().train(False)

    @property
    def device(self) -> torch.device | None:
        """Where the weights are, or None without any."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return None if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights, float32 without any."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)


# rewards/transforms.py


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Resample = Literal["bicubic", "bilinear"]
PIL_RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, for numerical checks."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def straight_through_clamp(x: Tensor) -> Tensor:
    """Clamp to [0, 1] in the forward pass; the gradient passes as if there were no clamp."""
    return x + (x.clamp(0, 1) - x).detach()


def resize(images: Tensor, size: tuple[int, int], resample: Resample = "bicubic", single_pass: bool = False) -> Tensor:
    """Resize (B, C, H, W) images in [0, 1] to `size` = (height, width), antialiased, in float32 or more.

    Pillow resizes uint8 images in two passes, each of which is rounded and clipped. Doing the same on float images,
    without the rounding, agrees with it to 1.13/255 in the worst case. One unclamped pass (`single_pass=True`, what
    torchvision and ReNO do on float tensors) is off by up to 22/255 on sharp edges.
    """
    images = at_least_float32(images)
    if single_pass:
        return F.interpolate(images, size, mode=resample, antialias=True, align_corners=False)
    # The clamps are straight-through: in a saturated area the resized values lie at 1 plus or minus a rounding error,
    # and a hard clamp would drop the gradient of every pixel that was rounded up, so it could never darken again.
    for target in (first_pass_size(images.shape[-2], images.shape[-1], size), size):
        images = F.interpolate(images, target, mode=resample, antialias=True, align_corners=False)
        images = straight_through_clamp(images)
    return images


def first_pass_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """What the first of Pillow's two passes makes of (height, width) on the way to `size`.

    The width goes first, unless the height loses more than twice as many pixels (since Pillow 13). The order is visible
    because of the clipping in between: up to 13/255 on a checkerboard.
    """
    if height - size[0] > max(0, 2 * (width - size[1])):
        return size[0], width
    return height, size[1]


def shortest_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    """The (height, width) that brings the shorter side to `edge`; the longer one is truncated, as transformers does."""
    return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Centre crop of (..., H, W) to `size`; a side that is too short is padded with zeros, as transformers does."""
    (height, width), (crop_height, crop_width) = images.shape[-2:], size
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return F.pad(images, (-left, crop_width - width + left, -top, crop_height - height + top))


def longest_edge_pad(images: Tensor, edge: int = 224) -> Tensor:
    """Bring the longer side to `edge` and pad with zeros to a square: the preprocessing of HPSv2.

    One pass without a clamp, since the original resizes float tensors.
    Source: https://github.com/tgxs002/HPSv2, `ResizeMaxSize`.
    """
    scale = edge / max(images.shape[-2:])
    size = (round(images.shape[-2] * scale), round(images.shape[-1] * scale))
    images = resize(images, size, single_pass=True)
    top, left = (edge - size[0]) // 2, (edge - size[1]) // 2
    return F.pad(images, (left, edge - size[1] - left, top, edge - size[0] - top))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(images - mean) / std` per channel of (B, C, H, W)."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


@dataclass(frozen=True)
class ImageTransform:
    """Images (B, 3, H, W) in [0, 1] -> the pixels a vision tower expects, in float32. The defaults are CLIP's.

    Args:
        size: the shorter side's length, an exact (height, width), or None not to resize.
        crop: (height, width) of the centre crop, or None.
        mean, std: per channel, or None not to normalise.
        resample: the filter, always antialiased.
        single_pass: resize as float-tensor code does (one pass, no clamp) and not as Pillow does.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] | None = CLIP_MEAN
    std: tuple[float, ...] | None = CLIP_STD
    resample: Resample = "bicubic"
    single_pass: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        images = at_least_float32(images)
        if not self.single_pass:
            # Decoders overshoot. A hard clamp would give those pixels no gradient, and they would stay saturated.
            images = straight_through_clamp(images)
        size = self.size
        if isinstance(size, int):
            size = shortest_edge(images.shape[-2], images.shape[-1], size)
        if size is not None:
            images = resize(images, size, self.resample, self.single_pass)
        if self.crop is not None:
            images = center_crop(images, self.crop)
        if self.mean is not None and self.std is not None:
            images = normalize(images, self.mean, self.std)
        return images

    def as_in_reno(self) -> "ImageTransform":
        """What ReNO's released code does in place of this transform: the same in one unclamped pass."""
        return replace(self, single_pass=True)

    @classmethod
    def from_processor_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "ImageTransform":
        """Read a checkpoint's image processor settings; what they leave out is as in transformers' CLIP processor.

        Args:
            config: the settings as a dict, or the Hub id or folder that holds `preprocessor_config.json`.

        Raises:
            ValueError: for a `size` or `resample` that has no differentiable equivalent here.
            OSError: when there is no such file.
        """
        if not isinstance(config, Mapping):
            config, _ = ImageProcessingMixin.get_image_processor_dict(
                config, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
            )
        size = processor_size(config.get("size", 224))
        # Processors that squash to an exact size (BLIP, SigLIP) leave `do_center_crop` out and do not crop.
        cropped = config.get("do_center_crop", isinstance(size, int))
        return cls(
            size=size if config.get("do_resize", True) else None,
            crop=processor_crop(config.get("crop_size", 224)) if cropped else None,
            mean=tuple(config.get("image_mean", CLIP_MEAN)) if config.get("do_normalize", True) else None,
            std=tuple(config.get("image_std", CLIP_STD)) if config.get("do_normalize", True) else None,
            resample=processor_resample(config.get("resample", 3)),
        )


@dataclass(frozen=True)
class PadTransform:
    """HPSv2's pixels: the longer side to `size`, black to a square, CLIP's normalisation, float32.

    As in the original, one pass without a clamp. See `longest_edge_pad`.

    Args:
        size: the side of the square.
        mean, std: per channel.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        return normalize(longest_edge_pad(images, self.size), self.mean, self.std)

    def as_in_reno(self) -> ImageTransform:
        """What ReNO's released code does in place of this transform: it crops, as for every other reward."""
        return ImageTransform(self.size, (self.size, self.size), self.mean, self.std, single_pass=True)


def processor_size(size: int | Mapping[str, int | None]) -> int | tuple[int, int]:
    """The `size` of a processor config: an int for the shorter side, a (height, width) for an exact size."""
    if isinstance(size, int):
        return size
    given = {key: value for key, value in size.items() if value is not None}
    if given.keys() == {"shortest_edge"}:
        return given["shortest_edge"]
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    raise ValueError(
        f"Expected the image processor's `size` to be an int, {{'shortest_edge'}} or {{'height', 'width'}}, but got "
        f"{size}. Pass your own `image_transform` to the reward."
    )


def processor_crop(size: int | Mapping[str, int]) -> tuple[int, int]:
    """The `crop_size` of a processor config as (height, width)."""
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def processor_resample(resample: int) -> Resample:
    """The `resample` code of Pillow as a mode of `torch.nn.functional.interpolate`."""
    if resample not in PIL_RESAMPLE:
        raise ValueError(
            f"Expected the image processor's `resample` to be 2 (bilinear) or 3 (bicubic), but got {resample}. Pass "
            "your own `image_transform` to the reward."
        )
    return PIL_RESAMPLE[resample]


# rewards/reward.py


RewardT = TypeVar("RewardT", bound="Reward")


class NonFiniteReward(ValueError):
    """A reward, its gradient or the images it was given are NaN or infinite."""


class NonDifferentiableReward(ValueError):
    """A gradient was asked of a reward that gives none."""


class Reward(FrozenModule):
    """Scores images: `reward(images, prompts) -> (B,)`, float32, higher is better, in the published units.

    A subclass implements `score`; one with text features also `encode_text`, one with weights also `load`. It hands its
    modules to this constructor, which freezes them. The gradient from the scores to the images is always kept.

    Attributes:
        name: the name under which scores are reported.
        differentiable: whether the scores have a gradient with respect to the images.
        requires_prompt: whether `prompts=None` is refused.
        range: the lowest and highest possible score, where the formula bounds it.
        license: the licence of the default checkpoint.
        default_checkpoint: the Hub id that `from_pretrained()` loads.
        weights_file: the file of the default checkpoint that holds the weights, where it is not what transformers
            saves; a folder that has it is recognised by it.
        published_at: where that file is to be had, for weights that are in no Hub repository.
        parameter_count: how many parameters the default checkpoint has.
        text_modules: dotted names of the modules that only `encode_text` needs; `drop_text_encoder` removes them.
    """

    name: str = "reward"
    differentiable: bool = True
    requires_prompt: bool = True
    range: tuple[float, float] | None = None
    license: str | None = None
    default_checkpoint: str | None = None
    weights_file: str | None = None
    published_at: str | None = None
    parameter_count: int | None = None
    text_modules: tuple[str, ...] = ()

    def __init__(self, **modules: nn.Module):
        super().__init__(**modules)
        # The text of a run is encoded once, not once per step; about 4 kB per prompt. Beside the features is the
        # precision of the tower that gave them: another one encodes anew.
        self.prompt_features: dict[str, tuple[torch.dtype, Tensor]] = {}
        self.has_text_encoder = True

    def forward(self, images: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        """Check the input, score it, check the scores.

        Args:
            images: (B, 3, H, W), floating point, in [0, 1], on any device.
            prompts: one per image, or a single one for all.

        Returns:
            (B,) float32, on the device of `images`.

        Raises:
            ValueError: images or prompts that do not meet the contract, or scores of another shape than (B,).
            NonFiniteReward: NaN images, or scores that are not finite.
            NonDifferentiableReward: the images require a gradient and a reward with `differentiable = True` cut it.
        """
        check_images(images, f"reward '{self.name}'")
        texts = prompts_per_image(prompts, len(images), self.name, self.requires_prompt)
        device = self.device or images.device
        pixels = at_least_float32(images if self.differentiable else images.detach()).to(device)
        scores = self.score(pixels, texts)
        check_scores(scores, len(images), self.name)
        if pixels.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise NonDifferentiableReward(
                f"Expected a gradient from reward '{self.name}', but its scores are detached from the images. Remove "
                "`.detach()`, `.item()`, `no_grad` and round trips through NumPy or PIL from it, or set "
                "`differentiable = False` on it and use a method without gradients, such as best-of-N."
            )
        return scores.to(images.device, torch.float32)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1], on this reward's device, and B prompts -> (B,).

        The input has been checked. `prompts` are empty strings when none were given to a reward that requires none.
        """
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `score`.")

    def check_size(self, prompt: str, height: int, width: int) -> None:
        """Raise `ValueError` for images of a size that cannot be scored. Called before a diffusion model runs."""

    def encode_text(self, prompt: str) -> Tensor:
        """The features of one prompt, any shape. Called once per prompt, without gradients."""
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `encode_text`.")

    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """(N, ...) features of N prompts, float32; each distinct prompt is encoded once and kept.

        Raises:
            ValueError: a new prompt after `drop_text_encoder`.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        for text in dict.fromkeys(texts):
            precision, _ = self.prompt_features.get(text, (None, None))
            if precision is None and not self.has_text_encoder:
                raise ValueError(
                    f"Expected a prompt that reward '{self.name}' encoded before its text encoder was dropped, but "
                    f"got {text!r}. Pass it to `drop_text_encoder` too, or load the reward again."
                )
            if self.has_text_encoder and precision != self.dtype:
                # Tensors made in inference mode could never enter a graph later.
                with torch.inference_mode(False), torch.no_grad():
                    self.prompt_features[text] = self.dtype, at_least_float32(self.encode_text(text))
        return torch.stack([self.prompt_features[text][1] for text in texts]).to(self.device)

    def drop_text_encoder(self, prompts: str | Sequence[str]) -> None:
        """Encode `prompts`, then free what only text needs: a CLIP-H has a third of its weights there.

        From then on the reward scores these prompts, and those that it encoded before, only. Nothing happens to a
        reward that reads text and image together, or no text.
        """
        if not self.text_modules:
            return
        self.encode_prompt(prompts)
        for path in self.text_modules:
            parent, _, name = path.rpartition(".")
            setattr(self.get_submodule(parent), name, None)
        self.has_text_encoder = False

    @classmethod
    def from_pretrained(
        cls: type[RewardT],
        checkpoint: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RewardT:
        """Load from a Hub id or a folder, by default `default_checkpoint`.

        `dtype` is that of the weights, by default bfloat16 on CUDA and float32 elsewhere. Scores are float32 anyway.
        """
        checkpoint = checkpoint or cls.require_default_checkpoint()
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        on_cuda = device is not None and torch.device(device).type == "cuda"
        reward = cls.load(str(checkpoint), hub)
        return reward.to(device=device, dtype=dtype or (torch.bfloat16 if on_cuda else torch.float32))

    @classmethod
    def require_default_checkpoint(cls) -> str:
        """The default checkpoint.

        Raises:
            ValueError: there is none; it says where the weights are.
        """
        if cls.default_checkpoint is None and cls.published_at is not None:
            raise ValueError(
                f"Expected a folder for reward '{cls.name}', whose weights are not on the Hub, but got only its name. "
                f"Download {cls.weights_file} from {cls.published_at} and pass the folder that it is in."
            )
        if cls.default_checkpoint is None:
            raise ValueError(f"`{cls.__name__}` has no default checkpoint. Pass a Hub id or a folder.")
        return cls.default_checkpoint

    @classmethod
    def load(cls: type[RewardT], checkpoint: str, hub: dict[str, Any]) -> RewardT:
        """Build the reward in float32 from a checkpoint. `hub` holds `from_pretrained`'s revision, cache_dir, token and
        local_files_only."""
        raise NotImplementedError(f"`{cls.__name__}` has no weights to load: build it with its constructor.")


class CallableReward(Reward):
    """Any callable `(images, prompts) -> (B,)` as a reward, under its own name and with its own class facts.

    `name`, `differentiable`, `requires_prompt`, `range` and `license` are read from the callable where it has them. A
    module is frozen and set to evaluation mode.
    """

    function: Callable[[Tensor, list[str]], Tensor]

    def __init__(self, function: Callable[[Tensor, list[str]], Tensor]):
        super().__init__(**({"function": function} if isinstance(function, nn.Module) else {}))
        if not isinstance(function, nn.Module):
            self.function = function
        self.name = callable_name(function)
        source = function.func if isinstance(function, functools.partial) else function
        self.differentiable = getattr(source, "differentiable", True)
        self.requires_prompt = getattr(source, "requires_prompt", True)
        self.range = getattr(source, "range", None)
        self.license = getattr(source, "license", None)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.function(images, prompts)


def callable_name(function: Any) -> str:
    """The `name` or `__name__` of a callable, the class name of an object, "reward" for a lambda."""
    if isinstance(function, functools.partial):
        function = function.func
    for name in (getattr(function, "name", None), getattr(function, "__name__", None), type(function).__name__):
        if isinstance(name, str):
            return "reward" if name == "<lambda>" else name
    return "reward"


def check_images(images: Tensor, who: str) -> None:
    """Raise unless `images` is a (B, 3, H, W) floating-point tensor in [0, 1], with 0.05 of tolerance, for `who`."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"Expected images for {who} as a floating-point tensor (B, 3, H, W), but got {got}. Call the "
            'pipeline with `output_type="pt"`.'
        )
    if not images.numel():
        raise ValueError(f"Expected at least one image of at least one pixel for {who}, but got {tuple(images.shape)}.")
    low, high = (bound.item() for bound in images.detach().aminmax())
    if low != low or high != high:
        raise NonFiniteReward(
            f"Expected pixels in [0, 1] for {who}, but got NaN. A VAE that overflows in float16 "
            "needs float32 or bfloat16."
        )
    # Models trained on [0, 1] score [-1, 1] images without complaint, and finite gradients hide the mistake.
    if low < -0.05 or high > 1.05:
        raise ValueError(
            f"Expected pixels in [0, 1] for {who}, but got values from {low:.3g} to {high:.3g}. Map decoder "
            "output in [-1, 1] with `(images / 2 + 0.5).clamp(0, 1)`."
        )


def check_reward_device(device: Any) -> None:
    """Raise `ValueError` unless `device` is a device, its name, or `None`."""
    try:
        torch.device(device if device is not None else "cpu")
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'Expected `reward_device` to be a device such as "cuda:1" or "cpu", or `None`, but got {device!r}.'
        ) from error


def prompts_per_image(prompts: str | Sequence[str] | None, batch: int, name: str, required: bool) -> list[str]:
    """`batch` prompts: a single one is repeated; None becomes empty strings unless `required`."""
    if prompts is None:
        if required:
            raise ValueError(
                f"Expected a prompt for reward '{name}', but got None. Pass `prompts`, also beside "
                "embeddings, or set `requires_prompt = False` on a reward that does not read it."
            )
        return [""] * batch
    texts = [prompts] * batch if isinstance(prompts, str) else list(prompts)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"Expected prompts for reward '{name}' as strings, but got {[type(t).__name__ for t in texts]}."
        )
    if len(texts) != batch:
        raise ValueError(
            f"Expected {batch} prompts for reward '{name}', one per image, but got {len(texts)}. Pass a single "
            "string to use it for every image."
        )
    return texts


def check_scores(scores: Tensor, batch: int, name: str) -> None:
    """Raise unless `scores` is a finite tensor of shape (batch,)."""
    if not isinstance(scores, Tensor) or scores.shape != (batch,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"Expected reward '{name}' to return a tensor of shape ({batch},), one score per image, but got {got}. "
            "Average each image's values over everything but the batch, as in `values.flatten(1).mean(1)`."
        )
    finite = scores.detach().isfinite()
    if not finite.all():
        where = (~finite).nonzero().flatten().tolist()
        raise NonFiniteReward(
            f"Expected finite scores from reward '{name}', but those of images {where} are NaN or infinite. Load "
            "it with `dtype=torch.float32` if it ran in half precision."
        )


def check_gradient(reward: Reward, prompts: str | None = "a photo", height: int = 64, width: int = 64) -> None:
    """Score one random image and see that a gradient reaches its pixels, before any diffusion model runs.

    Warns when the gradient is zero everywhere, as it is behind a `round()`. The global random state is left alone.

    Raises:
        NonDifferentiableReward: the reward says so, or cuts the graph.
        NonFiniteReward: the score or its gradient is NaN or infinite.
    """
    if not reward.differentiable:
        raise NonDifferentiableReward(f"Expected a reward with a gradient, but '{reward.name}' is not differentiable.")
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images, allow_unused=True)
    if gradient is None:
        raise NonDifferentiableReward(
            f"Expected a gradient from reward '{reward.name}', but its scores do not depend on the images."
        )
    if not gradient.isfinite().all():
        raise NonFiniteReward(
            f"Expected a finite gradient from reward '{reward.name}', but it has NaN or infinite values."
        )
    if not gradient.any():
        warnings.warn(
            f"The gradient of reward '{reward.name}' is zero on a random image, as behind `round` or a threshold.",
            stacklevel=2,
        )


# rewards/registry.py


RewardFactory = Callable[..., Reward]
RewardFactoryT = TypeVar("RewardFactoryT", bound=RewardFactory)

# name or alias -> (name, what builds it); architecture or `model_type` of a config.json -> the class that loads it
REWARDS: dict[str, tuple[str, RewardFactory]] = {}
REWARD_LOADERS: dict[str, tuple[str, type[Reward]]] = {}


def register_reward(
    name: str, *aliases: str, loads: str | Iterable[str] = ()
) -> Callable[[RewardFactoryT], RewardFactoryT]:
    """Register a `Reward` class, or a function that returns a reward, under a name.

    Args:
        name: what users write in `rewards=` and read in results.
        aliases: further names it is found by.
        loads: which checkpoints the class loads when only a Hub id or folder is given: their `model_type` in
            config.json, or the class under `architectures`, which is looked up first.

    Raises:
        ValueError: a name that something else has. Registering again what has the same qualified name replaces it,
            since diffusers executes the code of a Hub pipeline twice per load.
    """

    def register(factory: RewardFactoryT) -> RewardFactoryT:
        claims = [(REWARDS, key) for key in (name, *aliases)]
        claims += [(REWARD_LOADERS, key) for key in ((loads,) if isinstance(loads, str) else loads)]
        for table, key in claims:
            taken_by = table[key][1].__qualname__ if key in table else factory.__qualname__
            if taken_by != factory.__qualname__:
                raise ValueError(f"Expected a free reward name, but '{key}' is taken by `{taken_by}`. Choose another.")
        for table, key in claims:
            table[key] = (name, factory)
        return factory

    return register


def list_rewards() -> list[str]:
    """The registered names, sorted, without aliases."""
    return sorted({name for name, _ in REWARDS.values()})


def find_reward(name_or_path: str) -> RewardFactory | None:
    """What is registered under a name or alias, or None for a Hub id or an existing folder.

    Raises:
        ValueError: for anything else, and for a reward whose weights are in no Hub repository.
    """
    if name_or_path in REWARDS:
        factory = REWARDS[name_or_path][1]
        if isinstance(factory, type) and issubclass(factory, Reward) and factory.published_at:
            factory.require_default_checkpoint()
        return factory
    if os.path.isdir(name_or_path) or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name_or_path):
        return None
    close = difflib.get_close_matches(name_or_path.lower(), REWARDS)
    hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
    raise ValueError(
        f"Expected a reward name out of {list_rewards()}, a Hub id such as 'org/name' or a folder, but got "
        f"'{name_or_path}'.{hint} A callable `(images, prompts) -> (B,)` works too."
    )


class AutoReward:
    """Loads the reward that a name, a Hub id or a folder stands for."""

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Reward:
        """A registered name gives that reward with its default checkpoint. A Hub id or folder gives the reward whose
        default checkpoint it is, or whose weights are in the folder under their published name, or which loads the
        architecture or `model_type` in its config.json. A registered name wins over a folder of the same name.

        The keyword arguments are those of `Reward.from_pretrained`; a reward without weights needs none of them.

        Raises:
            ValueError: an unknown name, or a model type that no reward loads.
        """
        path = os.fspath(name_or_path)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        factory = find_reward(path)
        if factory is None:
            reward_class = published_as(path) or reward_class_of(PretrainedConfig.get_config_dict(path, **hub)[0], path)
            return reward_class.from_pretrained(path, dtype=dtype, device=device, **hub)
        if isinstance(factory, type) and issubclass(factory, Reward) and factory.default_checkpoint:
            return factory.from_pretrained(dtype=dtype, device=device, **hub)
        return factory().to(device=device, dtype=dtype)


def published_as(path: str) -> type[Reward] | None:
    """The first registered class whose default checkpoint `path` is, or whose weights file is in that folder."""
    for _, factory in REWARDS.values():
        if not (isinstance(factory, type) and issubclass(factory, Reward)):
            continue
        in_folder = factory.weights_file is not None and os.path.isfile(os.path.join(path, factory.weights_file))
        if in_folder or path == factory.default_checkpoint:
            return factory
    return None


def reward_class_of(config: Mapping[str, Any], path: str) -> type[Reward]:
    """The class that loads checkpoints with this config.json, also of types that transformers does not know."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for kind in (*(architectures or ()), model_type):
        if kind in REWARD_LOADERS:
            return REWARD_LOADERS[kind][1]
    raise ValueError(
        f"Expected a checkpoint of the model type or architecture {sorted(REWARD_LOADERS)}, but '{path}' is of type "
        f"'{model_type}', architecture {architectures}. Load it yourself and pass a callable "
        "`(images, prompts) -> (B,)`."
    )


# rewards/aesthetic.py


CLIP_VIT_L = "openai/clip-vit-large-patch14"
AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_V1_FILE = "sa_0_4_vit_l_14_linear.pth"


class CLIPVisionTower(CLIPVisionModelWithProjection):
    """The vision tower out of the checkpoint of a whole CLIP, without a warning about its other half."""

    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]


class AestheticHead(nn.Module):
    """(B, D) image embeddings -> (B, 1): five linear layers without activations, one linear map in effect.

    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor. Its dropout, which only takes places in
    the numbering of the layers here, is for training.
    """

    def __init__(self, embedding_size: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embedding_size, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)


@register_reward("aesthetic")
class Aesthetic(Reward):
    """LAION's aesthetic score v2, "sac+logos+ava1": from 1 to 10, mostly 4.5 to 7. No prompt.

    A head on the unit image embedding of CLIP ViT-L/14, in float32 whatever the precision of the weights. A folder may
    hold the head as its authors publish it, `sac+logos+ava1-l14-linearMSE.pth`.

    Args:
        model: the vision tower of CLIP; it is frozen.
        head: (B, D) embeddings -> (B, 1) scores; it is frozen.
        image_transform: images in [0, 1] -> the pixels; by default CLIP's transform at the model's image size.
    """

    name = "aesthetic"
    requires_prompt = False
    license = "apache-2.0"
    default_checkpoint = "ttj/sac-logos-ava1-l14-linearMSE"
    weights_file = AESTHETIC_FILE
    parameter_count = 304_894_177
    model: CLIPVisionModelWithProjection
    head: nn.Module

    def __init__(
        self,
        model: CLIPVisionModelWithProjection,
        head: nn.Module,
        image_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(model=model, head=head)
        edge = cast(int, model.config.image_size)
        self.image_transform = image_transform or ImageTransform(size=edge, crop=(edge, edge))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        weights = {name: at_least_float32(weight) for name, weight in self.head.named_parameters()}
        return functional_call(self.head, weights, self.encode_image(images))[:, 0]

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, D) unit vectors, float32."""
        pixels = self.image_transform(images).to(self.dtype)
        return F.normalize(at_least_float32(self.model(pixel_values=pixels).image_embeds), dim=-1)

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "Aesthetic":
        path = checkpoint_path(checkpoint, cls.head_file(checkpoint), hub)
        source, source_hub = holder_of("preprocessor_config.json", checkpoint, CLIP_VIT_L, hub)
        model = load_pretrained(CLIPVisionTower, source, source_hub)
        head = cls.build_head(model.config.projection_dim)
        load_strictly(head, read_state_dict(path), path.name)
        return cls(model, head, ImageTransform.from_processor_config(source, **source_hub))

    @classmethod
    def head_file(cls, checkpoint: str) -> str:
        """The file of the head: the authors' where a folder has it, else that of the default checkpoint."""
        in_folder = os.path.isfile(os.path.join(checkpoint, AESTHETIC_FILE))
        return AESTHETIC_FILE if in_folder else "model.safetensors"

    @staticmethod
    def build_head(embedding_size: int) -> nn.Module:
        return AestheticHead(embedding_size)


@register_reward("aesthetic_v1")
class AestheticV1(Aesthetic):
    """LAION's aesthetic score v1: a single linear layer on the unit image embedding of CLIP ViT-L/14, from 1 to 10.

    Its head is not on the Hub: download `sa_0_4_vit_l_14_linear.pth` from the GitHub project
    LAION-AI/aesthetic-predictor and pass the folder that it is in.
    """

    name = "aesthetic_v1"
    license = "mit"
    default_checkpoint = None
    weights_file = AESTHETIC_V1_FILE
    published_at = "the GitHub project LAION-AI/aesthetic-predictor"
    parameter_count = 303_966_977

    @classmethod
    def head_file(cls, checkpoint: str) -> str:
        return AESTHETIC_V1_FILE

    @staticmethod
    def build_head(embedding_size: int) -> nn.Module:
        return nn.Linear(embedding_size, 1)


# rewards/class_table.py


ClassT = TypeVar("ClassT", bound=type)


class ClassTable(Generic[ClassT]):
    """Classes of one kind under their names.

    Args:
        kind: what they are, for messages: "features", "set reward".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.classes: dict[str, ClassT] = {}

    def register(self, name: str) -> Callable[[ClassT], ClassT]:
        """A decorator that enters a class.

        Raises:
            ValueError: a name that another class has. Registering again what has the same qualified name replaces it,
                since diffusers executes the code of a Hub pipeline twice per load.
        """

        def enter(entry: ClassT) -> ClassT:
            taken_by = self.classes.get(name, entry).__qualname__
            if taken_by != entry.__qualname__:
                raise ValueError(
                    f"Expected a free {self.kind} name, but '{name}' is taken by `{taken_by}`. Choose another."
                )
            self.classes[name] = entry
            return entry

        return enter

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self.classes)

    def find(self, name: str, otherwise: str = "") -> ClassT:
        """The class of a name; `otherwise` is what else would have been accepted, for the message.

        Raises:
            ValueError: for a name that is not registered.
        """
        if name not in self.classes:
            close = difflib.get_close_matches(name.lower(), self.classes)
            hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
            raise ValueError(f"Expected {self.kind} out of {self.names()}{otherwise}, but got '{name}'.{hint}")
        return self.classes[name]


# rewards/features.py


FeatureMetric = Literal["cosine", "l2", "squared_l2"]
FeaturesT = TypeVar("FeaturesT", bound="Features")


class Features(FrozenModule):
    """Maps images to features: `features(images) -> (B, ...)`, float32, with a gradient to the images.

    A subclass implements `encode`; one with weights of its own also `load`. It hands its modules to this constructor,
    which freezes them. The features of an image do not depend on its neighbours, so they may be computed one image at a
    time, detached, kept and compared later (`PairwiseDistance.between`, `SetReward.of_features`).

    Attributes:
        name: the name under which values are reported.
        metric: the distance that these features are made for: "cosine" is 1 - cos, the mean over positions where there
            are several; "l2" and "squared_l2" are those of all numbers of an image, whose scale is that of the
            published distance.
        differentiable: whether there is a gradient with respect to the images.
        license: the licence of the weights.
        default_checkpoint: the Hub id that `from_pretrained()` loads, or None.
        package: the optional package that brings the weights instead; noiseopt's extra is called the same.
        parameter_count: how many parameters there are, where there are weights by default.
    """

    name: str = "features"
    metric: FeatureMetric = "cosine"
    differentiable: bool = True
    license: str | None = None
    default_checkpoint: str | None = None
    package: str | None = None
    parameter_count: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Images to features.

        Args:
            images: (B, 3, H, W), floating point, in [0, 1], on any device.

        Returns:
            (B, D), or (B, P, D) for features at P positions; float32, on the device of the weights.

        Raises:
            ValueError: images that do not meet the contract.
        """
        check_images(images, f"the features of {self.name}")
        return at_least_float32(self.encode(at_least_float32(images).to(self.device or images.device)))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1], on the device of the weights -> (B, D) or (B, P, D)."""
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `encode`.")

    @classmethod
    def from_pretrained(
        cls: type[FeaturesT],
        checkpoint: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> FeaturesT:
        """Load from a Hub id or a folder, by default `default_checkpoint`.

        `dtype` is that of the weights, by default float32: nearly equal images differ by less than bfloat16 resolves.
        """
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        features = cls.load(checkpoint or cls.default_checkpoint, hub)
        return features.to(device=device, dtype=dtype or torch.float32)

    @classmethod
    def load(cls: type[FeaturesT], checkpoint: str | None, hub: dict[str, Any]) -> FeaturesT:
        """Build the features in float32. `hub` holds `from_pretrained`'s revision, cache_dir, token and
        local_files_only."""
        check_no_checkpoint(cls, checkpoint)
        return cls()


FEATURES: ClassTable[type[Features]] = ClassTable("features")


def register_features(name: str) -> Callable[[type[FeaturesT]], type[FeaturesT]]:
    """Register a class of features under a name.

    Raises:
        ValueError: a name that another class has.
    """
    return FEATURES.register(name)  # pyright: ignore[reportReturnType]


def list_features() -> list[str]:
    """The registered names, sorted."""
    return FEATURES.names()


def check_no_checkpoint(features: type[Features], checkpoint: str | None) -> None:
    """Raise `ValueError` for a checkpoint of features that have none on the Hub."""
    if checkpoint is not None:
        raise ValueError(
            f"Expected no checkpoint for the features '{features.name}', but got {checkpoint!r}. They have no weights, "
            "or those of a package: leave it out."
        )


def import_optional(package: str) -> ModuleType:
    """The module of an optional package.

    Raises:
        ImportError: it is not installed, or the torchvision that it needs does not fit torch.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # a torchvision for CUDA beside a torch for the CPU: RuntimeError
        reason = str(error).partition("\n")[0]
        raise ImportError(
            f"Expected the package `{package}`, but it cannot be imported: {reason}. Install the torchvision build "
            f"that matches your torch first (https://pytorch.org/get-started), then `pip install noiseopt[{package}]`. "
            "A torchvision that does not match breaks transformers too."
        ) from error


# rewards/image_features.py


FeatureKind = Literal["cls", "patch"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What the released code of It's Never Too Late (https://arxiv.org/abs/2601.00090) gives DINOv2: the whole picture
# squashed to 256², 18 × 18 patches of 14 and a rest that is dropped. Theirs is not antialiased, so that of a large
# picture only some pixels get a gradient.
NEVER_TOO_LATE_TRANSFORM = ImageTransform(
    size=(256, 256), crop=None, mean=IMAGENET_MEAN, std=IMAGENET_STD, resample="bilinear", single_pass=True
)


class ImageFeatures(Features):
    """Features of a vision model; two images are compared by the cosine of theirs, patch by patch if there are several.

    "cls" is one vector an image: what the model compares with texts where it has a text side (CLIP, SigLIP), else its
    first token (ViT, DINOv2, DINOv3), else its pooled output where it has no such token. The pooler of a ViT is left
    out: most checkpoints have no weights for it. "patch" is the tokens of the patches, without class and register
    tokens.

    Args:
        model: a vision model, or a dual encoder.
        image_transform: images in [0, 1] -> the pixels that it expects.
        kind: "cls" or "patch"; by default that of the class.

    Raises:
        ValueError: another kind.
    """

    kind: FeatureKind = "cls"
    model_class: Any = AutoModel
    model: PreTrainedModel

    def __init__(
        self, model: PreTrainedModel, image_transform: Callable[[Tensor], Tensor], kind: FeatureKind | None = None
    ) -> None:
        super().__init__(model=model)
        self.kind = checked_kind(kind or self.kind)
        self.image_transform = image_transform
        if type(self) is ImageFeatures:
            self.name = type(model).__name__

    def encode(self, images: Tensor) -> Tensor:
        pixels = self.image_transform(images).to(self.model.dtype)
        return self.pooled(pixels) if self.kind == "cls" else self.patches(pixels)

    def pooled(self, pixels: Tensor) -> Tensor:
        """(B, D), the "cls" features of preprocessed images."""
        encode_image = getattr(self.model, "get_image_features", None)
        if encode_image is not None:
            return encode_image(pixel_values=pixels).pooler_output
        output = self.model(pixel_values=pixels)
        if "image_embeds" in output:  # an image tower with its projection
            return output.image_embeds
        hidden = output.last_hidden_state
        if hidden.ndim == 3 and hidden.shape[1] > self.patch_count(pixels):
            return hidden[:, 0]
        if output.pooler_output is None:
            raise ValueError(
                f"Expected a class token or a pooled output, but {type(self.model).__name__} has none. "
                "Use kind='patch'."
            )
        return output.pooler_output.flatten(1)

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, P, D), the patch tokens of preprocessed images, row by row; class and register tokens come first."""
        tower = getattr(self.model, "vision_model", self.model)
        hidden = tower(pixel_values=pixels).last_hidden_state
        if hidden.ndim != 3:
            raise ValueError(
                f"Expected a model with patch tokens, but {type(self.model).__name__} has none. Use kind='cls'."
            )
        return hidden[:, -self.patch_count(pixels) :]

    def patch_count(self, pixels: Tensor) -> int:
        """How many patches the images are cut into; what is left over at the edges is dropped."""
        config = getattr(self.model.config, "vision_config", self.model.config)
        return (pixels.shape[-2] // config.patch_size) * (pixels.shape[-1] // config.patch_size)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike[str] | None = None,
        kind: FeatureKind | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ImageFeatures":
        """Load a model and its preprocessing from a Hub id or a folder; `dtype` of the weights, by default float32."""
        checked_kind(kind or cls.kind)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        source = None if checkpoint is None else os.fspath(checkpoint)
        features = super().from_pretrained(source, **hub, dtype=dtype, device=device)
        features.kind = kind or cls.kind
        return features

    @classmethod
    def load(cls, checkpoint: str | None, hub: dict[str, Any]) -> "ImageFeatures":
        if checkpoint is None:
            raise ValueError(f"`{cls.__name__}` has no default checkpoint. Pass a Hub id or a folder.")
        transform = ImageTransform.from_processor_config(checkpoint, **hub)
        return cls(cls.model_class.from_pretrained(checkpoint, dtype=torch.float32, **hub), transform)


def checked_kind(kind: FeatureKind) -> FeatureKind:
    """`kind` itself. Raises `ValueError` for what is none."""
    if kind not in get_args(FeatureKind):
        raise ValueError(f"Expected the features 'cls' or 'patch', but got {kind!r}.")
    return kind


@register_features("dinov2")
class DINOv2Features(ImageFeatures):
    """The class token of DINOv2-base, (B, 768): https://arxiv.org/abs/2304.07193."""

    name = "dinov2"
    license = "apache-2.0"
    default_checkpoint = "facebook/dinov2-base"
    parameter_count = 86_580_480


@register_features("dinov2_patch")
class DINOv2PatchFeatures(DINOv2Features):
    """The patch tokens of DINOv2-base, (B, 256, 768): the features of It's Never Too Late, which keep the layout.

    By default the pictures are preprocessed as the checkpoint says: a centre crop, so that the ends of a picture that
    is no square do not count. `features.image_transform = NEVER_TOO_LATE_TRANSFORM` squashes the whole picture instead,
    as the released code does: (B, 324, 768).
    """

    name = "dinov2_patch"
    kind = "patch"


@register_features("clip")
class CLIPFeatures(ImageFeatures):
    """The image embedding of OpenAI's CLIP ViT-L/14, (B, 768): https://arxiv.org/abs/2103.00020.

    Not that of CLIP-H, although it is better: CLIPScore, PickScore and HPSv2 are CLIP-H or tuned from it, so its
    features are not held out from what is optimised. The text tower is not loaded.
    """

    name = "clip"
    license = "unstated (code: mit)"
    default_checkpoint = "openai/clip-vit-large-patch14"
    parameter_count = 303_966_208
    model_class = CLIPVisionModelWithProjection


# rewards/auto_features.py


class AutoFeatures:
    """Loads the features that a name, a Hub id or a folder stands for."""

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Features:
        """A registered name gives those features with their default checkpoint; a Hub id or folder gives one vector an
        image of the vision model there. A registered name wins over a folder of the same name.

        The keyword arguments are those of `Features.from_pretrained`. What a package brings (LPIPS, DreamSim) is not on
        the Hub: of its arguments `cache_dir` alone may matter.

        Raises:
            ValueError: a name that is unknown.
            ImportError: a package that is not installed.
        """
        path = os.fspath(name_or_path)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        features = find_features(path)
        if features is not None:
            return features.from_pretrained(**hub, dtype=dtype, device=device)
        published = (entry for entry in FEATURES.classes.values() if entry.default_checkpoint == path)
        return next(published, ImageFeatures).from_pretrained(path, **hub, dtype=dtype, device=device)


def find_features(name_or_path: str) -> type[Features] | None:
    """The class that is registered under a name, or None for a Hub id or an existing folder.

    Raises:
        ValueError: for anything else.
    """
    is_path = os.path.isdir(name_or_path) or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name_or_path)
    if is_path and name_or_path not in FEATURES.classes:
        return None
    return FEATURES.find(name_or_path, ", a Hub id such as 'org/name' or a folder")


# rewards/black_box.py


@dataclass(frozen=True)
class BlackBoxQuestion:
    """An image and its prompt, to be asked about.

    Attributes:
        index: its place among the images of the call.
        key: equal for equal pixels and prompt.
    """

    index: int
    image: Image.Image
    prompt: str
    key: tuple[bytes, str]

    @classmethod
    def of(cls, index: int, pixels: Tensor, prompt: str) -> "BlackBoxQuestion":
        """From `pixels` (H, W, 3) uint8 on the CPU."""
        array = pixels.contiguous().numpy()
        key = hashlib.sha256(str(array.shape).encode() + array.tobytes()).digest()
        return cls(index, Image.fromarray(array), prompt, (key, prompt))


class BlackBox(Reward):
    """`score(image, prompt) -> float`, of one PIL image and its prompt, as a reward: a web service, a person.

    Images are asked about in threads. A call that raises is tried again after 1, 2, 4 ... times `backoff` seconds. When
    the last try fails, or Ctrl-C is pressed, nothing more is asked and the error is raised at once; what is under way
    then ends by itself. An image and prompt that were answered are not asked about again, so that an image that stays
    the same costs one call. There is no gradient: for methods without, such as `BestOfN`, `ZeroOrderSearch` or `PCN`.

    Args:
        score: called with an RGB image of 8 bits and the prompt, from several threads at a time; what it returns is
            made a float, higher is better. Its `name`, `requires_prompt`, `range` and `license` are taken over where it
            has them.
        workers: how many calls may be under way at a time, at least 1; 1 for a person.
        retries: how many times more a call is tried that raises, at least 0.
        timeout: seconds for one try; a longer one counts as failed, and goes on unseen, as no thread can be ended.
            `None` to wait for ever.
        backoff: seconds before the second try, at least 0.
        name: what its scores are called; by default the name of the function.

    Raises:
        RuntimeError: from a call, naming image and prompt whose last try failed; its cause is what was raised.
        NonFiniteReward: from a call, for an answer that is NaN or infinite.
        TypeError: from a call, for an answer that is no number.
    """

    differentiable = False

    def __init__(
        self,
        score: Callable[[Image.Image, str], float],
        workers: int = 4,
        retries: int = 3,
        timeout: float | None = None,
        *,
        backoff: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not callable(score) or isinstance(score, type):
            raise TypeError(f"Expected a function `score(image, prompt) -> float`, but got {score!r}.")
        check_asking(workers, retries, timeout, backoff)
        self.asked, self.name = score, name or callable_name(score)
        self.workers, self.retries, self.timeout, self.backoff = workers, retries, timeout, backoff
        self.requires_prompt = getattr(score, "requires_prompt", True)
        self.range, self.license = getattr(score, "range", None), getattr(score, "license", None)
        self.answers: dict[tuple[bytes, str], float] = {}

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
        pairs = zip(pixels, prompts, strict=True)
        questions = [BlackBoxQuestion.of(index, image, prompt) for index, (image, prompt) in enumerate(pairs)]
        new = {question.key: question for question in reversed(questions) if question.key not in self.answers}
        if new:
            self.ask_all(sorted(new.values(), key=lambda question: question.index))
        answers = [self.answers[question.key] for question in questions]
        return torch.tensor(answers, dtype=torch.float32, device=images.device)

    def ask_all(self, questions: list[BlackBoxQuestion]) -> None:
        """Have all answered, or raise what the first one of those that fail raises."""
        over = threading.Event()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix=f"black box {self.name}")
        try:
            futures = [pool.submit(self.ask, question, over) for question in questions]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
        finally:  # also on Ctrl-C, which reaches the thread that waits
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, question: BlackBoxQuestion, over: threading.Event) -> None:
        """Try until there is an answer, and remember it; give up when it is `over`: a failure ends it for all."""
        try:
            for tries in range(self.retries + 1):
                ended = over.wait(self.backoff * 2 ** (tries - 1)) if tries else over.is_set()
                if ended or self.tried(question, tries):
                    return
        except Exception:
            over.set()
            raise

    def tried(self, question: BlackBoxQuestion, tries: int) -> bool:
        """Whether there is an answer now; raises if there is none after the last try."""
        try:
            answer = within(self.timeout, self.asked, question.image.copy(), question.prompt)
        except Exception as error:
            if tries == self.retries:
                raise self.unanswered(question, error) from error
            return False
        self.answers[question.key] = self.checked(answer, question)
        return True

    def unanswered(self, question: BlackBoxQuestion, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"Expected a score from '{self.name}' for image {question.index} of the prompt {question.prompt!r}, but "
            f"{self.retries + 1} tries failed, the last with {type(error).__name__}: {error}. Raise `retries`, "
            "`backoff` or `timeout` if the service recovers."
        )

    def checked(self, answer: Any, question: BlackBoxQuestion) -> float:
        where = f"from '{self.name}' for image {question.index} of the prompt {question.prompt!r}"
        try:
            value = float(answer)
        except (TypeError, ValueError):
            raise TypeError(f"Expected a number {where}, but got {answer!r}. Return a float.") from None
        if not math.isfinite(value):
            raise NonFiniteReward(f"Expected a finite number {where}, but got {value}. Raise for what has no score.")
        return value


def check_asking(workers: Any, retries: Any, timeout: Any, backoff: Any) -> None:
    """Raise `ValueError` for settings of a `BlackBox` that cannot work."""
    for name, value, least in (("workers", workers, 1), ("retries", retries, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"Expected `{name}` to be an integer of {least} or more, but got {value!r}.")
    if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
        raise ValueError(f"Expected `timeout` to be more than 0 seconds, or None, but got {timeout!r}.")
    if not (isinstance(backoff, int | float) and 0 <= backoff < math.inf):
        raise ValueError(f"Expected `backoff` to be a finite number of seconds of at least 0, but got {backoff!r}.")


def within(seconds: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns or raises; `TimeoutError` if it takes longer, and its thread is left to itself."""
    if seconds is None:
        return function(*arguments)
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    wait([future], seconds)
    if not future.done():
        raise TimeoutError(f"no answer within {seconds:g} s")
    return future.result()


# rewards/image_text.py


class PromptTokens:
    """Prompts -> token ids and attention mask, (B, L) each. The same prompts are tokenised once.

    Features of a text tower that attends to the image change with every image; the ids are all that can be kept.

    Args:
        tokenizer: the tokenizer of the text tower; it needs a padding token.
        max_length: longer prompts are cut to so many tokens, the special ones included.
        padding: to "max_length" or to the "longest" prompt. Masked either way.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        padding: Literal["longest", "max_length"] = "max_length",
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.padding = padding
        self.batches: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        key = tuple(prompts)
        if key not in self.batches:
            tokens = self.tokenizer(list(key), padding=self.padding, truncation=True, max_length=self.max_length)
            self.batches[key] = torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])
        ids, mask = self.batches[key]
        return ids.to(device), mask.to(device)


def precise_linear(layer: nn.Linear, features: Tensor) -> Tensor:
    """The layer computed in float32 or more, whatever the precision of its weights.

    A scoring head costs nothing, and in bfloat16 it would round a score of 2 to steps of 0.016.
    """
    features = at_least_float32(features)
    return F.linear(features, layer.weight.to(features.dtype), layer.bias.to(features.dtype))


# rewards/blip_itm.py


BlipITMT = TypeVar("BlipITMT", bound="BlipITM")

# Of captions in BLIP's own inference code; its retrieval models were not trained on longer ones.
BLIP_CAPTION_LENGTH = 35


@register_reward("blip_itm", loads="BlipForImageTextRetrieval")
class BlipITM(Reward):
    """`softmax(itm_head(f))[1]`, f the text tower's [CLS] feature after it has attended to the image: P(it matches).

    BLIP: https://arxiv.org/abs/2201.12086. In [0, 1]. The gradient vanishes near both ends, where that of
    `BlipITC` does not.

    Args:
        model: the BLIP model; it is frozen.
        tokenizer: the tokenizer of that model.
        image_transform: images in [0, 1] -> its pixels; by default a bicubic resize to the model's square image size
            with CLIP's mean and deviation.
    """

    name = "blip_itm"
    range = (0.0, 1.0)
    license = "bsd-3-clause"
    default_checkpoint = "Salesforce/blip-itm-base-coco"
    parameter_count = 223_744_258
    model: BlipForImageTextRetrieval

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(model=model)
        edge = cast(int, model.vision_model.config.image_size)
        self.tokens = PromptTokens(tokenizer, BLIP_CAPTION_LENGTH)
        self.image_transform = image_transform or ImageTransform(size=(edge, edge), crop=None)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        # Not through the model's own forward: it makes a mask on the CPU, wherever the images are.
        ids, mask = self.tokens(prompts, images.device)
        patches = self.encode_patches(images)
        text = self.model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches)
        return precise_linear(self.model.itm_head, text.last_hidden_state[:, 0]).softmax(-1)[:, 1]

    def encode_patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, 1 + patches, D) features of the image tower."""
        pixels = self.image_transform(images).to(self.dtype)
        return self.model.vision_model(pixel_values=pixels).last_hidden_state

    @classmethod
    def load(cls: type[BlipITMT], checkpoint: str, hub: dict[str, Any]) -> BlipITMT:
        model = load_pretrained(BlipForImageTextRetrieval, checkpoint, hub)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **hub)
        return cls(model, tokenizer, ImageTransform.from_processor_config(checkpoint, **hub))


@register_reward("blip_itc")
class BlipITC(BlipITM):
    """`cos(vision_proj(image), text_proj(text))` of the same model: the towers see nothing of one another.

    BLIP: https://arxiv.org/abs/2201.12086. In [-1, 1]. The text is encoded once per prompt. The arguments are those of
    `BlipITM`.
    """

    name = "blip_itc"
    range = (-1.0, 1.0)
    text_modules = ("model.text_encoder", "model.text_proj")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        image = precise_linear(self.model.vision_proj, self.encode_patches(images)[:, 0])
        return (F.normalize(image, dim=-1) * self.encode_prompt(prompts)).sum(-1)

    def encode_text(self, prompt: str) -> Tensor:
        """(D,) unit vector of the prompt."""
        ids, mask = self.tokens([prompt], self.model.text_proj.weight.device)
        text = self.model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize(precise_linear(self.model.text_proj, text[0, 0]), dim=-1)


# rewards/blip_vqa.py


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


# rewards/vlm_pixels.py


def vlm_pixels(images: Tensor, image_processor: Any) -> Tensor:
    """What an image processor makes of its input, from (B, 3, H, W) images in [0, 1], with a gradient.

    The size and filter of the resize, the crop, mean and standard deviation are the processor's own. Each image is one
    tile: processors that cut large images into several are asked not to.

    Returns:
        `pixel_values` in the layout of the processor, in float32 or more: (B, 3, h, w); (B * patches, values of a
        patch) for Qwen's; (B, 1, 3, h, w) for those of Idefics 3 and SmolVLM.

    Raises:
        ValueError: for a class of processor that is not in `PIXEL_LAYOUTS`.
    """
    return PIXEL_LAYOUTS[image_processor_kind(image_processor)](images, image_processor)


def image_processor_kind(image_processor: Any) -> str:
    """The name of its class without the backend: "CLIPImageProcessor" of `CLIPImageProcessorPil` too."""
    kind = type(image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if kind not in PIXEL_LAYOUTS:
        raise ValueError(
            f"Expected an image processor out of {sorted(PIXEL_LAYOUTS)}, but got {kind}. Pass `preprocess=`, images "
            "(B, 3, H, W) in [0, 1] -> `pixel_values`."
        )
    return kind


def one_tile(images: Tensor, image_processor: Any) -> Tensor:
    """(B, 3, H, W) -> (B, 3, h, w): shorter side and crop as CLIP has it, or an exact size, whatever is set."""
    return ImageTransform.from_processor_config(image_processor.to_dict())(images)


def qwen_patches(images: Tensor, image_processor: Any) -> Tensor:
    """(B, 3, H, W) -> (B * gh * gw, 3 * 2 * p * p): the patches of Qwen2-VL and later, image by image."""
    settings = image_processor.to_dict()
    patch, merge, bounds = settings["patch_size"], settings["merge_size"], settings["size"]
    height, width = images.shape[-2:]
    size = smart_resize(height, width, patch * merge, bounds["shortest_edge"], bounds["longest_edge"])
    settings["size"] = {"height": size[0], "width": size[1]}
    pixels = ImageTransform.from_processor_config(settings)(images)
    return patchify(pixels, patch, merge, settings["temporal_patch_size"])


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size that Qwen-VL sees: multiples of `factor`, between two numbers of pixels, the aspect about kept.

    Source: `smart_resize` of transformers, `models/qwen2_vl/image_processing_qwen2_vl.py`.
    """
    size = (round(height / factor) * factor, round(width / factor) * factor)
    if size[0] * size[1] > max_pixels:
        shrink = factor * math.sqrt(height * width / max_pixels)
        return max(1, math.floor(height / shrink)) * factor, max(1, math.floor(width / shrink)) * factor
    if size[0] * size[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width)) / factor
        return math.ceil(height * grow) * factor, math.ceil(width * grow) * factor
    return size


def patchify(pixels: Tensor, patch: int, merge: int, temporal: int) -> Tensor:
    """(B, C, H, W) -> (B * gh * gw, C * temporal * patch * patch), in the order of Qwen's processors.

    Patches that the model merges, `merge` by `merge`, follow one another; an image is `temporal` equal frames.
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(batch, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    blocks = blocks.expand(*blocks.shape[:6], temporal, patch, patch)
    return blocks.reshape(batch * rows * columns, channels * temporal * patch * patch)


def idefics_tile(images: Tensor, image_processor: Any) -> Tensor:
    """(B, 3, H, W) -> (B, 1, 3, e, e): to the longest edge, then squashed to a square, as without image splitting."""
    settings = image_processor.to_dict()
    edge = settings["max_image_size"]["longest_edge"]
    pixels = straight_through_clamp(at_least_float32(images))
    whole = longest_edge_even(images.shape[-2], images.shape[-1], settings["size"]["longest_edge"])
    for size in (whole, (edge, edge)):
        pixels = lanczos_resize(pixels, size)
    square = {"height": edge, "width": edge}
    finish = ImageTransform.from_processor_config({**settings, "size": square, "do_resize": False, "resample": 3})
    return finish(pixels)[:, None]


def longest_edge_even(height: int, width: int, edge: int) -> tuple[int, int]:
    """The (height, width) that brings the longer side to `edge`; the other is cut to a whole number, then made even.

    Source: `_resize_output_size_rescale_to_max_len` of transformers, `models/idefics3/image_processing_idefics3.py`.
    """
    shorter = int(edge / (width / height)) if width >= height else int(edge * (width / height))
    shorter = max(1, shorter + shorter % 2)
    return (shorter, edge) if width >= height else (edge, shorter)


def lanczos_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's Lanczos filter on (B, C, H, W) in [0, 1]: two passes, each of them clamped as uint8 would be."""
    for height, width in (first_pass_size(images.shape[-2], images.shape[-1], size), size):
        down, across = lanczos_weights(images.shape[-2], height), lanczos_weights(images.shape[-1], width)
        images = straight_through_clamp(down.to(images) @ images @ across.to(images).T)
    return images


def lanczos_weights(length: int, target: int) -> Tensor:
    """(target, length) float64, rows that sum to 1: a windowed sinc over three lobes, wider when it shrinks."""
    scale = length / target
    centers = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    offsets = (torch.arange(length, dtype=torch.float64) + 0.5 - centers[:, None]) / max(scale, 1.0)
    weights = torch.where(offsets.abs() < 3, torch.sinc(offsets) * torch.sinc(offsets / 3), 0.0)
    return weights / weights.sum(1, keepdim=True)


# The class of an image processor, without its backend -> what it does to images
PIXEL_LAYOUTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "BlipImageProcessor": one_tile,
    "CLIPImageProcessor": one_tile,
    "Gemma3ImageProcessor": one_tile,
    "GotOcr2ImageProcessor": one_tile,
    "Idefics3ImageProcessor": idefics_tile,
    "Qwen2VLImageProcessor": qwen_patches,
    "SiglipImageProcessor": one_tile,
    "SmolVLMImageProcessor": idefics_tile,
}


# rewards/vlm_inputs.py


PIXEL_TOLERANCE = 0.05  # in normalised units: three grey levels
ANSWER_ROOM = 8  # tokens of the context that are kept free for an answer

Placeholder = Callable[[PretrainedConfig, Mapping[str, Tensor], str], str]


def qwen_placeholder(config: PretrainedConfig, pixels: Mapping[str, Tensor], token: str) -> str:
    """One token for each patch that is left after merging."""
    merge: int = config.vision_config.spatial_merge_size
    return token * (int(pixels["image_grid_thw"].prod()) // merge**2)


def internvl_placeholder(config: PretrainedConfig, pixels: Mapping[str, Tensor], token: str) -> str:
    """The tokens of one tile between those that begin and end an image."""
    return "<img>" + token * config.image_seq_length + "</img>"


def smolvlm_placeholder(config: PretrainedConfig, pixels: Mapping[str, Tensor], token: str) -> str:
    """The tokens of one tile, announced as the whole image."""
    vision = config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    return "<fake_token_around_image><global-img>" + token * count + "<fake_token_around_image>"


@dataclass(frozen=True, kw_only=True)
class VLMFamily:
    """How checkpoints of one model type are asked.

    Attributes:
        prompt: the text around a question for checkpoints that come without a chat template.
        settings: arguments of the processor, such that an image is one tile.
        placeholder: what stands in the text for an image, for families whose processor needs torchvision.
        answer_type: the `token_type_ids` of an answer.
    """

    prompt: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    placeholder: Placeholder | None = None
    answer_type: int = 0


# `model_type` of a config.json -> how it is asked
VLM_FAMILIES: dict[str, VLMFamily] = {
    "blip-2": VLMFamily(prompt="Question: {} Answer:"),
    "gemma3": VLMFamily(settings={"do_pan_and_scan": False}),
    "idefics3": VLMFamily(settings={"do_image_splitting": False}),
    "instructblip": VLMFamily(prompt="Question: {}"),
    "internvl": VLMFamily(settings={"crop_to_patches": False}, placeholder=internvl_placeholder),
    "llava": VLMFamily(prompt="USER: <image>\n{} ASSISTANT:"),
    # What the model reads is attended to in both directions (0), what it writes is causal (1).
    "paligemma": VLMFamily(prompt="<image>answer en {}", answer_type=1),
    "qwen2_5_vl": VLMFamily(placeholder=qwen_placeholder),
    "qwen2_vl": VLMFamily(placeholder=qwen_placeholder),
    "qwen3_vl": VLMFamily(placeholder=qwen_placeholder),
    "smolvlm": VLMFamily(settings={"do_image_splitting": False}, placeholder=smolvlm_placeholder),
}


def vlm_family(model_type: str) -> VLMFamily:
    """The family of a model type. Raises `ValueError` for one that is not written here."""
    if model_type not in VLM_FAMILIES:
        raise ValueError(
            f"Expected a vision-language model of the type {sorted(VLM_FAMILIES)}, but got '{model_type}', whose "
            "pixels are not written here. Load model and processor yourself and pass `VQAScorer` also `preprocess=`, "
            "images (B, 3, H, W) in [0, 1] -> `pixel_values`."
        )
    return VLM_FAMILIES[model_type]


class TokenizerAndImageProcessor:
    """A tokenizer and an image processor in place of a processor class that cannot be built without torchvision.

    Those of families that also take videos ask for it, though images do not need it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        config: PretrainedConfig,
        placeholder: Placeholder,
        chat_template: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.placeholder = placeholder
        self.chat_template: Any = chat_template or tokenizer.chat_template
        self.image_token = str(tokenizer.convert_ids_to_tokens(config.image_token_id))

    def apply_chat_template(self, chat: list[dict[str, Any]], **arguments: Any) -> Any:
        return self.tokenizer.apply_chat_template(chat, chat_template=self.chat_template, **arguments)

    def __call__(
        self,
        *,
        text: list[str],
        images: list[Any],
        return_tensors: str,
        add_special_tokens: bool = True,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """The inputs of the model for one image in one text."""
        pixels = self.image_processor(images=images, return_tensors=return_tensors, **settings)
        filled = text[0].replace(self.image_token, self.placeholder(self.config, pixels, self.image_token), 1)
        tokens = self.tokenizer([filled], return_tensors=return_tensors, add_special_tokens=add_special_tokens)
        kinds = (tokens["input_ids"] == self.config.image_token_id).long()
        return {**tokens, **pixels, "mm_token_type_ids": kinds}


def load_vlm_processor(checkpoint: str, config: PretrainedConfig, hub: Mapping[str, Any]) -> Any:
    """The processor of a checkpoint, or what stands in for it without torchvision."""
    placeholder = vlm_family(config.model_type).placeholder
    if placeholder is None:
        return AutoProcessor.from_pretrained(checkpoint, **hub)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **hub)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", **hub)
    settings, _ = ProcessorMixin.get_processor_dict(checkpoint, **hub)
    return TokenizerAndImageProcessor(tokenizer, image_processor, config, placeholder, settings.get("chat_template"))


def probe_image(height: int, width: int) -> Tensor:
    """(1, 3, height, width) in [0, 1], of 256 levels; so smooth that all antialiasing filters agree on it."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


class VLMInputs:
    """The inputs of a vision-language model: pixels with a gradient, and the rest once for each text and image size.

    The rest comes from the checkpoint's own processor, called on a probe image. On that occasion our pixels of the
    probe are compared with the processor's.

    Args:
        model: tells the family, and which inputs it takes.
        processor: a transformers processor, or `TokenizerAndImageProcessor`.
        preprocess: images (B, 3, H, W) in [0, 1] -> `pixel_values`, instead of ours; it is not compared.
        prompt_format: the text around a question, "{}", with the image token if the family writes one; by default the
            chat template of the processor, else the family's own.

    Attributes:
        pixel_errors: (height, width) -> the largest difference from the processor's pixels, in normalised units.

    Raises:
        ValueError: for a family or image processor that is not written here, unless there is a `preprocess`; without
            any text around a question, or with one that has no "{}".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        prompt_format: str | None = None,
    ):
        if prompt_format is not None and "{}" not in prompt_format:
            raise ValueError(
                f"Expected a `prompt_format` with {{}} in place of the question, but got {prompt_format!r}."
            )
        kind = model.config.model_type
        self.family = vlm_family(kind) if preprocess is None else VLM_FAMILIES.get(kind, VLMFamily())
        self.processor = processor
        self.preprocess = preprocess
        self.prompt_format = prompt_format
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.limits = context_lengths(model.config, processor.tokenizer)
        self.cache: dict[tuple[str, str, tuple[int, int]], dict[str, Tensor]] = {}
        self.pixel_errors: dict[tuple[int, int], float] = {}
        if preprocess is None:
            image_processor_kind(processor.image_processor)
        self.surround("")

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> `pixel_values` of the model, in float32 or more."""
        if self.preprocess is not None:
            return self.preprocess(images)
        return vlm_pixels(images, self.processor.image_processor)

    def __call__(self, template: str, prompt: str, size: tuple[int, int]) -> dict[str, Tensor]:
        """All inputs but pixels for one image of (height, width), each (1, ...), on the CPU.

        Args:
            template: the question, "{}" for the prompt.
            prompt: cut at its end if the context is too short.
            size: (height, width) of the image.

        Raises:
            ValueError: our pixels are not the processor's, or no context is left for a prompt.
        """
        key = template, prompt, size
        if key not in self.cache:
            # Tensors made in inference mode could never enter a graph later.
            with torch.inference_mode(False), torch.no_grad():
                self.cache[key] = self.build(template, prompt, size)
        return self.cache[key]

    def build(self, template: str, prompt: str, size: tuple[int, int]) -> dict[str, Tensor]:
        """The same, not from the cache."""
        token = getattr(self.processor, "image_token", None)
        if token is not None and str(token) in prompt:
            raise ValueError(
                f"Expected a prompt without the model's image token, but got {prompt!r}. Remove '{token}'."
            )
        image = probe_image(*size)
        reference = self.process(template.replace("{}", prompt), image)
        while (excess := self.excess(reference)) > 0:
            prompt = self.shortened(prompt, excess)
            reference = self.process(template.replace("{}", prompt), image)
        if self.preprocess is None:
            self.check_pixels(image, reference["pixel_values"])
        wanted = self.accepted - {"labels", "pixel_values"}
        return {name: value for name, value in reference.items() if name in wanted}

    def process(self, question: str, image: Tensor) -> Mapping[str, Tensor]:
        """The processor's output for a question about an image (1, 3, H, W)."""
        text = self.surround(question)
        picture = Image.fromarray((image[0].permute(1, 2, 0) * 255).round().byte().numpy())
        settings = dict(self.family.settings)
        # Chat templates that begin with the token of the beginning do not want a second one.
        if (begin := self.processor.tokenizer.bos_token) and text.startswith(begin):
            settings["add_special_tokens"] = False
        return self.processor(text=[text], images=[picture], return_tensors="pt", **settings)

    def surround(self, question: str) -> str:
        """The whole text for a question."""
        if self.prompt_format is not None:
            return self.prompt_format.replace("{}", question)
        if getattr(self.processor, "chat_template", None) is not None:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if self.family.prompt is None:
            raise ValueError(
                f"Expected a chat template in {type(self.processor).__name__}, but it has none. Pass `prompt_format=`."
            )
        return self.family.prompt.replace("{}", question)

    def excess(self, reference: Mapping[str, Tensor]) -> int:
        """By how many tokens a text is too long; 0 or less if it is not."""
        lengths = {name: reference[name].shape[1] for name in self.limits if name in reference}
        return max(int(length + ANSWER_ROOM - self.limits[name]) for name, length in lengths.items())

    def shortened(self, prompt: str, excess: int) -> str:
        """A prompt without its last `excess` tokens, about."""
        count = len(self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if count <= excess:
            raise ValueError(
                f"Expected a context of at least {excess - count} tokens more than {self.limits} for the image and the "
                "question alone. Use smaller images or a shorter question."
            )
        return prompt[: len(prompt) * (count - excess) // count]

    def check_pixels(self, image: Tensor, expected: Tensor) -> None:
        """Raise unless our pixels of an image are the processor's."""
        pixels = self.pixels(image)
        error = float((pixels - expected).abs().max()) if pixels.shape == expected.shape else float("inf")
        if not error <= PIXEL_TOLERANCE:  # NaN too
            raise ValueError(
                f"Expected the pixels of {type(self.processor.image_processor).__name__}, {tuple(expected.shape)}, but "
                f"ours, {tuple(pixels.shape)}, differ by {error:.3g} from them. Pass `preprocess=`, images "
                "(B, 3, H, W) in [0, 1] -> `pixel_values`."
            )
        self.pixel_errors[(image.shape[-2], image.shape[-1])] = error


def context_lengths(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """How many tokens each text input of a model may have."""
    text = getattr(config, "text_config", config)
    lengths = {"input_ids": min(getattr(text, "max_position_embeddings", float("inf")), tokenizer.model_max_length)}
    if (reader := getattr(config, "qformer_config", None)) is not None:
        lengths["qformer_input_ids"] = reader.max_position_embeddings + ANSWER_ROOM  # it reads no answer
    return lengths


# rewards/vqa_score.py


QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
VQAMode = Literal["answer", "answer_eos", "yesno", "logodds"]


@register_reward("vqascore", loads=tuple(VLM_FAMILIES))
class VQAScorer(Reward):
    """P(yes) of `Does this figure show "{prompt}"? Please answer yes or no.` by an image-text-to-text model.

    VQAScore: https://arxiv.org/abs/2404.01291. Modes, from the logits of the tokens of the answer, in float32:

    - "answer": the probability, among all tokens, that the answer begins with one of `answers`; in [0, 1].
    - "answer_eos": exp of the mean log-probability of the first of `answers` and the end of the text, as the paper has
      it for CLIP-FlanT5; in [0, 1], and not comparable with "answer": about its square root.
    - "logodds": log P(answers) - log P(negatives), unbounded. It does not saturate near 0 and 1, so its gradient is
      the best conditioned one.
    - "yesno": the sigmoid of that, in [0, 1].

    `from_pretrained` gives mode "answer"; for another, `VQAScorer(reward.model, reward.processor, mode="logodds")`.

    Args:
        model: a model of one of the types in `VLM_FAMILIES`, or of another with a `preprocess`; it is frozen.
        processor: its processor, or a `TokenizerAndImageProcessor`.
        question: with "{}" for the prompt.
        answers: the ways to say yes, also with a space before it, which some models write after "Assistant:". Those
            that the tokenizer does not know, or knows as a lone space and a word, are left out.
        negatives: the ways to say no, for "yesno" and "logodds".
        mode: see above.
        preprocess: images (B, 3, H, W) in [0, 1] -> `pixel_values`, instead of those of the image processor.
        prompt_format: the text around the question, "{}", instead of the chat template.

    Raises:
        ValueError: an unknown mode or family, a question without "{}", or answers that cannot be told apart.
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
            raise ValueError(f"Expected a question with {{}} in place of the prompt, but got {question!r}.")
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
        # The tokens of "answer_eos": the first answer, whole, and the end.
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
        """Log of the probability that the answer to each image's question begins with one of its answers, (B,).

        Args:
            images: (B, 3, H, W) in [0, 1].
            questions: B questions as they are asked.
            answers: B lists of spellings of what is to be answered.
        """
        logits = self.next_logits(images, "{}", questions)[:, 0]
        tokens = [first_tokens(self.processor.tokenizer, variants) for variants in answers]
        return torch.cat([log_probability(row[None], ids) for row, ids in zip(logits, tokens, strict=True)])

    def next_logits(self, images: Tensor, template: str, prompts: Sequence[str], forced: Sequence[int] = ()) -> Tensor:
        """Logits of the answer's first token and of those that follow each of the `forced` ones: (B, 1 + forced, V)."""
        size = (images.shape[-2], images.shape[-1])
        inputs = [self.inputs(template, prompt, size) for prompt in prompts]
        parts, order = [], []
        for rows in rows_of_equal_shape(inputs):
            stacked = {name: torch.cat([inputs[row][name] for row in rows]) for name in inputs[rows[0]]}
            parts.append(self.answer_logits(images[rows], stacked, forced))
            order += rows
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def answer_logits(self, images: Tensor, inputs: Mapping[str, Tensor], forced: Sequence[int]) -> Tensor:
        """The same for inputs of one length, so that nothing is padded."""
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
        """Move and cast the weights, but leave float32 buffers in it when the weights become half precision.

        Rotary frequencies that were rounded to 8 bits turn by the wrong angle a few hundred tokens on.
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
        vlm_family(PretrainedConfig.get_config_dict(checkpoint, **hub)[0].get("model_type", ""))  # before the weights
        model = load_pretrained(cast(Any, AutoModelForImageTextToText), checkpoint, hub)
        return cast(Any, cls)(model, load_vlm_processor(checkpoint, model.config, hub))


def rows_of_equal_shape(inputs: Sequence[Mapping[str, Tensor]]) -> Iterator[list[int]]:
    """The indices of inputs that can be stacked."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for row, each in enumerate(inputs):
        groups.setdefault(tuple(value.shape for value in each.values()), []).append(row)
    yield from groups.values()


def appended(inputs: Mapping[str, Tensor], tokens: Sequence[int], answer_type: int) -> dict[str, Tensor]:
    """Inputs of a decoder, (B, length), with tokens of an answer after them."""
    ends = {"input_ids": torch.tensor(tokens, dtype=torch.long), "attention_mask": torch.ones(len(tokens))}
    ends |= {"token_type_ids": torch.full((len(tokens),), answer_type), "mm_token_type_ids": torch.zeros(len(tokens))}
    longer = dict(inputs)
    for name in ends.keys() & inputs.keys():
        end = ends[name].to(inputs[name]).expand(len(inputs[name]), -1)
        longer[name] = torch.cat((inputs[name], end), 1)
    return longer


def log_probability(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log of the probability of any of `tokens` under (B, V) logits, (B,), at most 0."""
    return logits.log_softmax(-1)[:, tokens].logsumexp(-1).clamp(max=0)


def first_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """The distinct tokens that words begin with; a word that the tokenizer does not know is left out.

    So is one whose first token is white space alone: "No" may follow it as well.

    Raises:
        ValueError: if it knows none, or for a string in place of the list.
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


# rewards/clip_flant5.py


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
T5_TOKENIZER = "google/flan-t5-xl"  # the same for all sizes
T5_CONTEXT = 2048  # tokens of text, as it was trained


@register_reward("clip_flant5", "clip-flant5", loads="clip_t5")
class CLIPFlanT5(Reward):
    """exp(mean log p) of the answer "Yes" and the end of the text to `Does this figure show "{prompt}"? ...`.

    VQAScore: https://arxiv.org/abs/2404.01291, with its own model: the patches of the last but one layer of a CLIP
    tower, projected, stand among the words that a T5 reads. Images are padded to a square with CLIP's mean colour.
    Source: https://github.com/linzhiqiu/CLIP-FlanT5, `clip_t5.py`, and https://github.com/linzhiqiu/t2v_metrics 1.2.

    Args:
        vision: the CLIP tower.
        projector: (B, N, width of the tower) -> (B, N, width of the T5).
        t5: the T5.
        tokenizer: of the T5, one that ends each text with the token of the end.
        image_transform: of square images in [0, 1]; by default CLIP's at the tower's size.
    """

    name = "clip_flant5"
    range = (0.0, 1.0)
    license = "apache-2.0"
    default_checkpoint = "zhiqiulin/clip-flant5-xl"
    parameter_count = 3_159_560_192
    vision: CLIPVisionModel
    projector: nn.Module
    t5: T5ForConditionalGeneration

    def __init__(
        self,
        vision: CLIPVisionModel,
        projector: nn.Module,
        t5: T5ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: ImageTransform | None = None,
    ):
        super().__init__(vision=vision, projector=projector, t5=t5)
        edge = cast(int, vision.config.image_size)
        self.tokenizer = tokenizer
        self.image_transform = image_transform or ImageTransform(size=edge, crop=(edge, edge))
        self.answer: list[int] = tokenizer("Yes")["input_ids"]
        if self.answer[-1] != tokenizer.eos_token_id:
            raise ValueError(
                f"Expected a tokenizer that ends texts with {tokenizer.eos_token!r}, but 'Yes' became {self.answer}. "
                f"Pass that of {T5_TOKENIZER}."
            )
        self.tokens: dict[str, tuple[list[int], list[int]]] = {}

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        patches = self.encode_image(images)
        return torch.cat([self.answer_score(*each) for each in zip(patches, prompts, strict=True)])

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, patches, width of the T5)."""
        mean = self.image_transform.mean or (0.0, 0.0, 0.0)
        square = pad_to_square(straight_through_clamp(at_least_float32(images)), [int(255 * m) / 255 for m in mean])
        pixels = self.image_transform(square).to(self.dtype)
        hidden = self.vision(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert hidden is not None
        return self.projector(hidden[-2][:, 1:])

    def answer_score(self, patches: Tensor, prompt: str) -> Tensor:
        """(patches, width) of one image -> (1,)."""
        embed = self.t5.get_input_embeddings()
        before, after = (embed(torch.tensor(ids, device=patches.device)) for ids in self.text_around_image(prompt))
        labels = torch.tensor([self.answer], device=patches.device)
        logits = self.t5(inputs_embeds=torch.cat((before, patches, after))[None], labels=labels, use_cache=False).logits
        return (-F.cross_entropy(at_least_float32(logits[0]), labels[0])).exp()[None]

    def text_around_image(self, prompt: str) -> tuple[list[int], list[int]]:
        """The tokens before and after the image, each with an end of its own; a long prompt is cut."""
        if prompt not in self.tokens:
            before = self.tokenizer(f"{SYSTEM} USER: ")["input_ids"]
            question = f"\n{QUESTION.format(prompt)} ASSISTANT: "
            room = T5_CONTEXT - len(before) - 1  # one for the image, as the original counts
            self.tokens[prompt] = before, self.tokenizer(question)["input_ids"][:room]
        return self.tokens[prompt]

    @classmethod
    def load(cls: type[RewardT], checkpoint: str, hub: dict[str, Any]) -> RewardT:
        settings, _ = PretrainedConfig.get_config_dict(checkpoint, **hub)
        tower = settings["mm_vision_tower"]
        others = {**hub, "revision": None}  # a revision is of the checkpoint alone
        vision_config = CLIPVisionConfig.from_pretrained(tower, **others)
        state = split_clip_flant5(read_shards(checkpoint, hub))
        t5 = untied_t5(T5Config.from_dict({**settings, "model_type": "t5"}))
        projector = clip_flant5_projector(vision_config.hidden_size, t5.config.d_model)
        vision = CLIPVisionModel(vision_config)
        if not state["vision"]:
            state["vision"] = CLIPVisionModel.from_pretrained(tower, dtype=torch.float32, **others).state_dict()
        for module, part in ((t5, "t5"), (projector, "projector"), (vision, "vision")):
            load_strictly(module, state[part], f"{checkpoint} ({part})")
        tokenizer = AutoTokenizer.from_pretrained(T5_TOKENIZER, **others)
        transform = ImageTransform.from_processor_config(tower, **others)
        return cast(Any, cls)(vision, projector, t5, tokenizer, transform)


def untied_t5(config: T5Config) -> T5ForConditionalGeneration:
    """An untrained T5 whose output layer has weights of its own, as Flan-T5 has.

    transformers 5 ties them to the embedding in every T5 it builds, and would then load one over the other.
    """
    t5 = T5ForConditionalGeneration(config)
    t5.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    return t5


def clip_flant5_projector(width: int, target: int) -> nn.Sequential:
    """LLaVA's "mlp2x_gelu": (..., width) -> (..., target)."""
    return nn.Sequential(nn.Linear(width, target), nn.GELU(), nn.Linear(target, target))


def pad_to_square(images: Tensor, color: list[float]) -> Tensor:
    """(B, 3, H, W) in the middle of a square of one colour, as LLaVA's `expand2square`."""
    height, width = images.shape[-2:]
    edge = max(height, width)
    top, left = (edge - height) // 2, (edge - width) // 2
    canvas = images.new_tensor(color)[:, None, None].expand(len(images), -1, edge, edge)
    inside = F.pad(torch.ones_like(images), (left, edge - width - left, top, edge - height - top))
    padded = F.pad(images, (left, edge - width - left, top, edge - height - top))
    return torch.where(inside > 0, padded, canvas)


def read_shards(checkpoint: str, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of all files that `pytorch_model.bin.index.json` lists. Raises `ValueError` if it lists none."""
    listed = read_settings(checkpoint_path(checkpoint, "pytorch_model.bin.index.json", hub)).get("weight_map")
    files = list(listed.values()) if isinstance(listed, dict) else []
    if not files or not all(isinstance(name, str) and name == os.path.basename(name) for name in files):
        raise ValueError(f"Expected pytorch_model.bin.index.json to list files of its folder, but got {files[:3]}.")
    state: dict[str, Tensor] = {}
    for name in sorted(set(files)):
        state |= read_state_dict(checkpoint_path(checkpoint, name, hub))
    return state


def split_clip_flant5(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The published keys, for T5, projector and CLIP tower.

    `mm_projector.*` is the projector, `vision_tower.vision_tower.vision_model.*` the tower, which was not trained and
    may be left out; all else is T5's, whose embedding has up to four names.
    """
    prefixes = {"projector": "mm_projector.", "vision": "vision_tower.vision_tower.vision_model."}
    parts: dict[str, dict[str, Tensor]] = {"t5": {}, "projector": {}, "vision": {}}
    for key, value in state.items():
        part = next((part for part, prefix in prefixes.items() if key.startswith(prefix)), "t5")
        if key != "embed_tokens.weight" and not key.endswith("embeddings.position_ids"):
            parts[part][key.removeprefix(prefixes.get(part, ""))] = value
    if (shared := state.get("shared.weight")) is not None:
        for stack in ("encoder", "decoder"):
            parts["t5"].setdefault(f"{stack}.embed_tokens.weight", shared)
    return parts


# rewards/clip_score.py


CLIP_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@register_reward("clipscore", loads="clip")
class CLIPScore(Reward):
    """`exp(logit_scale) * cos(image, text)` of a CLIP model: about 100 times the cosine.

    CLIPScore: https://arxiv.org/abs/2104.08718; in this form, with the raw prompt and without a clamp at 0, in ReNO:
    https://arxiv.org/abs/2406.04312. Norms, dot product and scale are float32 whatever the precision of the weights.

    Args:
        model: the CLIP model; it is frozen.
        tokenizer: the tokenizer of that model.
        image_transform: images in [0, 1] -> its pixels; by default CLIP's transform at the model's image size.
    """

    name = "clipscore"
    range = (-100.0, 100.0)
    license = "mit"
    default_checkpoint = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # literal: Hub cards are written without imports
    parameter_count = 986_109_441
    text_modules = ("model.text_model", "model.text_projection")
    model: CLIPModel

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(model=model)
        edge = cast(int, model.vision_model.config.image_size)
        self.tokenizer = tokenizer
        self.image_transform = image_transform or ImageTransform(size=edge, crop=(edge, edge))
        # A number and not the parameter: bfloat16 turns a scale of 100 into 98.9.
        self.logit_scale = model.logit_scale.detach().double().exp().item()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.logit_scale * (self.encode_image(images) * self.encode_prompt(prompts)).sum(-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, D) unit vectors, float32."""
        pixels = self.image_transform(images).to(self.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(at_least_float32(self.model.visual_projection(pooled)), dim=-1)

    def encode_text(self, prompt: str) -> Tensor:
        """(D,) unit vector of the prompt, truncated to the length the model was trained with."""
        config = self.model.text_model.config
        # One prompt at a time: no padding, so a tokenizer without a padding token works too.
        tokens = self.tokenizer(prompt, truncation=True, max_length=config.max_position_embeddings)
        ids = torch.tensor([tokens["input_ids"]], device=self.device)
        # CLIP reads the text feature at the end token, and silently at the *first* token if there is none. (Under the
        # legacy value 2 it looks for the highest id instead.)
        if config.eos_token_id != 2 and config.eos_token_id not in tokens["input_ids"]:
            raise ValueError(
                f"Expected the tokenizer to end prompts with the model's `eos_token_id` {config.eos_token_id}, but got "
                f"{tokens['input_ids']}. Use the tokenizer of this model, or build the model with the `eos_token_id` "
                "of this tokenizer."
            )
        pooled = self.model.text_model(input_ids=ids).pooler_output
        return F.normalize(at_least_float32(self.model.text_projection(pooled)), dim=-1)[0]

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "CLIPScore":
        model = load_pretrained(CLIPModel, checkpoint, hub)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **hub)
        return cls(model, tokenizer, ImageTransform.from_processor_config(checkpoint, **hub))


# rewards/color_channel.py


ColorChannelName = Literal["red", "green", "blue"]
COLOR_CHANNELS: tuple[ColorChannelName, ...] = ("red", "green", "blue")


class ColorChannel(Reward):
    """Mean over the pixels of `x[c] - x[c1] - x[c2]`, the wanted channel minus the two others, in [-2, 1].

    The demonstration criterion of the ReNO slides (https://arxiv.org/abs/2406.04312). No weights, no prompt.

    Raises:
        ValueError: a channel other than "red", "green" and "blue".
    """

    requires_prompt = False
    range = (-2.0, 1.0)

    def __init__(self, channel: ColorChannelName):
        if channel not in COLOR_CHANNELS:
            raise ValueError(f"Expected a channel out of {COLOR_CHANNELS}, but got {channel!r}.")
        super().__init__()
        self.name = channel
        self.channel = COLOR_CHANNELS.index(channel)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        means = images.mean((-2, -1))
        return 2 * means[:, self.channel] - means.sum(1)


@register_reward("red")
def red_channel() -> ColorChannel:
    """`ColorChannel("red")`."""
    return ColorChannel("red")


@register_reward("green")
def green_channel() -> ColorChannel:
    """`ColorChannel("green")`."""
    return ColorChannel("green")


@register_reward("blue")
def blue_channel() -> ColorChannel:
    """`ColorChannel("blue")`."""
    return ColorChannel("blue")


# rewards/color_histogram.py


@dataclass(frozen=True)
class SoftColorHistogram:
    """Images (B, 3, H, W) in [0, 1] -> (B, 3 * bins), the histogram of each channel, each summing to 1, in float32.

    Bin k of a channel is `mean(relu(1 - |(bins - 1) * x - k|))` over its pixels x: triangles around `k / (bins - 1)`.
    Each pixel is shared by two bins, so a change of its value moves mass between them; `torch.histc` has no gradient.
    With the distance of `histogram_distance` it is the colour criterion of "It's Never Too Late",
    https://arxiv.org/abs/2601.00090.

    Raises:
        ValueError: fewer than 2 bins.
    """

    bins: int = 32

    def __post_init__(self):
        if self.bins < 2:
            raise ValueError(f"Expected at least 2 bins, but got {self.bins}.")

    def __call__(self, images: Tensor) -> Tensor:
        values = straight_through_clamp(at_least_float32(images)).flatten(2)
        positions = values * (self.bins - 1)
        # The last bin has no right neighbour: a value of 1 is all of the left one's overflow.
        left = positions.detach().floor().clamp(0, self.bins - 2)
        overflow = positions - left
        # Two entries per pixel rather than one per pixel and bin: 16 times less memory than the formula as it stands.
        empty = values.new_zeros(*values.shape[:2], self.bins)
        counts = empty.scatter_add(2, left.long(), 1 - overflow).scatter_add(2, left.long() + 1, overflow)
        return (counts / values.shape[-1]).flatten(1)


def histogram_distance(a: Tensor, b: Tensor) -> Tensor:
    """(..., 3 * bins) histograms of two images -> (...), `|a - b|_2 / sqrt(6)`, in [0, 1].

    It is 1 where in every channel all pixels of one image lie in one bin and all of the other in another.
    """
    return torch.linalg.vector_norm(a - b, dim=-1) / math.sqrt(6)


@register_features("color_histogram")
class ColorHistogramFeatures(Features):
    """`SoftColorHistogram` of 32 bins, scaled so that the L2 distance of two images is `histogram_distance`."""

    name = "color_histogram"
    metric = "l2"

    def encode(self, images: Tensor) -> Tensor:
        return SoftColorHistogram()(images) / math.sqrt(6)


# rewards/cosine_kernel.py


def cosine_kernel(features: Tensor) -> Tensor:
    """(..., N, N) cosines of (..., N, D) features, float64 and with a gradient, whatever the features are.

    In float32 the rounding errors of nearly equal images would be eigenvalues of their own. Double precision is also
    what `torch.autocast` leaves alone; where a device has none (MPS), the kernel is on the CPU.

    Raises:
        ValueError: features without a dimension of images, or of none.
    """
    if features.ndim < 2 or features.shape[-2] < 1:
        raise ValueError(f"Expected features of shape (..., N, D), but got {tuple(features.shape)}.")
    device = "cpu" if features.device.type == "mps" else features.device
    directions = F.normalize(features.to(device).double(), dim=-1)
    return directions @ directions.mT


def kernels_of_set(features: Tensor) -> Tensor:
    """The kernel (N, N) of (N, D) features, or the kernels (P, N, N) of each position of (N, P, D)."""
    return cosine_kernel(features.transpose(0, 1) if features.ndim == 3 else features)


# rewards/pairwise_distance.py


class PairwiseDistance(nn.Module):
    """`distance(images_a, images_b) -> (N, M)`, with a gradient to both, in the metric that the features are made for.

    N images and M others are encoded once each. What is compared often is encoded once for all:

        known = distance.features(references).detach()
        distance.between(distance.features(images), known)

    Args:
        features: what the images are compared by.
    """

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, images_a: Tensor, images_b: Tensor | None = None) -> Tensor:
        """Images (N, 3, H, W) and (M, 3, H, W) in [0, 1], by default the same, to (N, M), on the device of the first.

        Raises:
            ValueError: images that do not meet the contract, or whose features do not fit together.
        """
        features_a = self.features(images_a)
        features_b = features_a if images_b is None else self.features(images_b)
        return self.between(features_a, features_b).to(images_a.device)

    def between(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """Features (N, ...) and (M, ...) of images, in float32 or more, to (N, M)."""
        if features_a.shape[1:] != features_b.shape[1:]:
            raise ValueError(
                f"Expected features of the same shape for '{self.features.name}', but got {tuple(features_a.shape)} "
                f"and {tuple(features_b.shape)}. Resize the images to one size."
            )
        return DISTANCES[self.features.metric](features_a, features_b)


def cosine_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """1 - cos of (N, D) and (M, D), or of (N, P, D) and (M, P, D) the mean over P, in [0, 2], to (N, M).

    One product of matrices: (N, M, P, D) never exists.
    """
    units_a, units_b = (F.normalize(features, dim=-1).flatten(1) for features in (features_a, features_b))
    positions = units_a.shape[1] // features_a.shape[-1]
    return 1 - units_a @ units_b.mT / positions


def l2_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """‖a - b‖ over all numbers of an image, (N, M); its gradient is 0 where a = b.

    Not by the product of the two: where they are close, the root makes 1e-3 of its rounding errors.
    """
    return torch.cdist(features_a.flatten(1), features_b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


def squared_l2_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """‖a - b‖² over all numbers of an image, (N, M), as ‖a‖² + ‖b‖² - 2ab: LPIPS has too many for N M differences."""
    vectors_a, vectors_b = features_a.flatten(1), features_b.flatten(1)
    squares = vectors_a.square().sum(1)[:, None] + vectors_b.square().sum(1)
    return (squares - 2 * vectors_a @ vectors_b.mT).clamp_min(0)


DISTANCES: dict[FeatureMetric, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "l2": l2_distance,
    "squared_l2": squared_l2_distance,
}


# rewards/set_reward.py


SetRewardT = TypeVar("SetRewardT", bound="SetReward")


class SetReward(nn.Module):
    """Scores a set of images by its features: `set_reward(images) -> scalar`, float32, higher is better.

    A subclass implements `score`, and is built from its features alone: `SetRewardClass(features)`. The value does not
    depend on the order of the images.

    To optimise a large set in the memory of one image, compute all features without a gradient, then the gradient of
    `of_features` with respect to them, then one image at a time: each image depends on the others through them alone.

    Args:
        features: what the images are compared by; frozen.

    Attributes:
        name: the name under which values are reported.
        range: the lowest and highest possible value of any set, where there is one.
        default_features: what `from_pretrained()` takes.
    """

    name: str = "set_reward"
    range: tuple[float, float] | None = None
    default_features: str = "dinov2"

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor, references: Tensor | None = None) -> Tensor:
        """The value of the set of all images and references together.

        Args:
            images: (B, 3, H, W) in [0, 1], on any device.
            references: (M, 3, H, W), images that are given: they count and get no gradient.

        Returns:
            a scalar, on the device of `images`.

        Raises:
            ValueError: fewer than two images in all, or images that do not meet the contract.
            NonFiniteReward: a value that is NaN or infinite.
        """
        known = None
        if references is not None:
            with torch.no_grad():
                known = self.features(references)
        return self.of_features(self.features(images), known).to(images.device)

    def of_features(self, features: Tensor, references: Tensor | None = None) -> Tensor:
        """The same of features (B, ...) and (M, ...), which `self.features` gave. Those of references may be kept.

        In a sequence, where one image is optimised against all before it, this is the published objective: the value of
        the union, in which the pairs of references are a constant. Features in half precision become float32;
        references go to the device and the type of the others.

        Raises:
            ValueError: fewer than two images in all, or references of another shape.
            NonFiniteReward: features or a value that are NaN or infinite.
        """
        features = self.union(at_least_float32(features), references)
        if not features.isfinite().all():
            raise NonFiniteReward(
                f"Expected finite features for the set reward '{self.name}', but some are NaN or infinite. Load "
                f"'{self.features.name}' with `dtype=torch.float32` if they ran in half precision."
            )
        value = self.score(features).to(features)
        if not value.isfinite():
            raise NonFiniteReward(f"Expected a finite value from the set reward '{self.name}', but got {value.item()}.")
        return value

    def union(self, features: Tensor, references: Tensor | None) -> Tensor:
        """Features (M + B, ...) of at least two images, those of references first and detached."""
        if references is not None and references.shape[1:] != features.shape[1:]:
            raise ValueError(
                f"Expected references with features of the shape {tuple(features.shape[1:])} of the images for the set "
                f"reward '{self.name}', but got {tuple(references.shape[1:])}. Compare images of one size by the same "
                "features."
            )
        if references is not None:
            features = torch.cat([references.detach().to(features), features])
        if len(features) < 2:
            raise ValueError(
                f"Expected at least 2 images for the set reward '{self.name}', references included, but got "
                f"{len(features)}. Draw several images of the prompt, or pass `references`."
            )
        return features

    def score(self, features: Tensor) -> Tensor:
        """(N, D) or (N, P, D) features of at least two images, in float32 or more -> scalar."""
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `score`.")

    def bounds(self, count: int) -> tuple[float, float] | None:
        """The lowest and highest possible value of a set of `count` images, references included, where there is one."""
        return self.range

    @classmethod
    def from_pretrained(
        cls: type[SetRewardT],
        features: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SetRewardT:
        """On the features of a name, a Hub id or a folder, by default `default_features`."""
        return cls(AutoFeatures.from_pretrained(features or cls.default_features, dtype=dtype, device=device))


SET_REWARDS: ClassTable[type[SetReward]] = ClassTable("set reward")


def register_set_reward(name: str) -> Callable[[type[SetRewardT]], type[SetRewardT]]:
    """Register a class of set rewards under a name.

    Raises:
        ValueError: a name that another class has.
    """
    return SET_REWARDS.register(name)  # pyright: ignore[reportReturnType]


def list_set_rewards() -> list[str]:
    """The registered names, sorted."""
    return SET_REWARDS.names()


def find_set_reward(name: str) -> type[SetReward]:
    """The class of a name. Raises `ValueError` for one that is not registered."""
    return SET_REWARDS.find(name)


@register_set_reward("pairwise")
class PairwiseDiversity(SetReward):
    """The mean distance of all pairs of images.

    On the patches of DINOv2 the objective of It's Never Too Late, https://arxiv.org/abs/2601.00090; on one vector an
    image 1 - MSS; on LPIPS the usual measure of diversity. One image far from the others is enough to raise it. In a
    cosine it has no gradient at images that are all the same.
    """

    name = "pairwise"
    default_features = "dinov2_patch"

    def __init__(self, features: Features) -> None:
        super().__init__(features)
        self.distance = PairwiseDistance(features)

    def score(self, features: Tensor) -> Tensor:
        first, second = torch.triu_indices(len(features), len(features), offset=1)
        return self.distance.between(features, features)[first, second].mean()


# rewards/dpp.py


DPP_JITTER = 1e-6


@register_set_reward("dpp")
class DPP(SetReward):
    """`logdet(I + K + 1e-6 I) / (N ln 2)` of the cosine kernel K of all N images, references included.

    The objective of It's Never Too Late, https://arxiv.org/abs/2601.00090, on the class token of DINOv2, after the
    determinantal point processes of https://arxiv.org/abs/1207.6083. It is 1 (to 1e-6) for images at right angles and
    `ln(1 + N) / (N ln 2)` for copies of one: .792 of 2, .580 of 4, .396 of 8. So a stop at a multiple of the first
    value is no use: of 4 images that can at most grow by 1.72. What the released code logs is this times N ln 2.

    Of features at several positions (N, P, D) it is the mean over the positions.

    One outlier is worth less than in the mean of pairs, and the last copy that changes more: of 4 images at right
    angles, .40 (there .50) and .25 (there .17) of the way from all alike to all different. Exact copies have no
    gradient, as in everything that is made of cosines.
    """

    name = "dpp"
    range = (0.0, 1.0)

    def score(self, features: Tensor) -> Tensor:
        count, kernels = len(features), kernels_of_set(features)
        identity = torch.eye(count, dtype=kernels.dtype, device=kernels.device)
        volumes = torch.linalg.slogdet(kernels + (1 + DPP_JITTER) * identity).logabsdet
        return volumes.mean() / (count * math.log(2))

    def bounds(self, count: int) -> tuple[float, float]:
        return math.log(1 + count) / (count * math.log(2)), 1.0


@register_set_reward("dpp_patch")
class DPPPatch(DPP):
    """`DPP` patch by patch: images must differ everywhere, or at least where others of the set agree."""

    name = "dpp_patch"
    default_features = "dinov2_patch"


# rewards/dreamsim_features.py


@register_features("dreamsim")
class DreamSimFeatures(Features):
    """The mean-centred embedding of DreamSim's ensemble (DINO, CLIP and OpenCLIP ViT-B/16 tuned to human judgements of
    similarity), (B, 1792); DreamSim's distance is 1 - cos of two of them: https://arxiv.org/abs/2306.09344.

    Args:
        model: what `dreamsim.dreamsim(...)` returns first. Its `embed` takes pixels in [0, 1] and does not resize:
            images are squashed to 224² here, as by the function that comes with the model.
    """

    name = "dreamsim"
    license = "mit"
    package = "dreamsim"
    dreamsim_type = "ensemble"
    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model=model)
        self.image_transform = ImageTransform(size=(224, 224), crop=None, mean=None, std=None)

    def encode(self, images: Tensor) -> Tensor:
        model: Any = self.model
        # A batch of one may come back without its batch dimension.
        embedding = at_least_float32(model.embed(self.image_transform(images).to(self.dtype))).reshape(len(images), -1)
        return embedding - embedding.mean(1, keepdim=True)

    @classmethod
    def load(cls, checkpoint: str | None, hub: dict[str, Any]) -> "DreamSimFeatures":
        """The package downloads its weights from GitHub, to `cache_dir` or beside what torch downloads."""
        check_no_checkpoint(cls, checkpoint)
        package, torch_cache = import_optional("dreamsim"), torch.hub.get_dir()
        folder = hub["cache_dir"] or os.path.join(torch_cache, "dreamsim")
        os.makedirs(folder, exist_ok=True)
        try:
            # Centring is done here, in float32; the package's default device is CUDA.
            model, _ = package.dreamsim(
                device="cpu", cache_dir=folder, dreamsim_type=cls.dreamsim_type, normalize_embeds=False
            )
        finally:
            torch.hub.set_dir(torch_cache)  # the package redirects it for the whole process
        return cls(model)


@register_features("dreamsim_dino")
class DreamSimDINOFeatures(DreamSimFeatures):
    """DreamSim's single DINO ViT-B/16, (B, 768): a third of the cost. The one of It's Never Too Late."""

    name = "dreamsim_dino"
    dreamsim_type = "dino_vitb16"


# rewards/open_clip.py


# open_clip -> transformers, outside of the blocks. Projections are multiplied from the other side.
OPEN_CLIP_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers spells it so
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
OPEN_CLIP_TRANSPOSED = ("text_projection", "visual.proj")
OPEN_CLIP_BUFFERS = ("attn_mask",)  # made anew by transformers
OPEN_CLIP_BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OPEN_CLIP_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
OPEN_CLIP_STACKED = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def clip_model_from_open_clip(state: Mapping[str, Tensor], config: CLIPConfig, source: str) -> CLIPModel:
    """A float32 `CLIPModel` with the weights of an open_clip model of the same shape.

    Args:
        state: open_clip's weights, in any precision; they are taken over without a second copy where they are float32.
        config: of the model. open_clip's ViT-H has `hidden_act="gelu"`, which is not the default of `CLIPConfig`.
        source: what to call the weights in errors.

    Raises:
        ValueError: naming keys that are unknown, missing or of another shape.
    """
    converted = clip_state_from_open_clip(state, source)
    with torch.device("meta"):
        check_weights(CLIPModel(config), converted, source)
    converted = {key: value.float() for key, value in converted.items()}
    return CLIPModel.from_pretrained(None, config=config, state_dict=converted, dtype=torch.float32)


def clip_state_from_open_clip(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights under transformers' names.

    Raises:
        ValueError: naming a key that open_clip's vision transformers do not have.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if stacked := OPEN_CLIP_STACKED.fullmatch(key):
            layer = open_clip_layer(stacked)
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                converted[f"{layer}.self_attn.{part}_proj.{stacked[3]}"] = tensor.contiguous()
        elif (block := OPEN_CLIP_BLOCK.fullmatch(key)) and block[3] in OPEN_CLIP_BLOCK_NAMES:
            converted[f"{open_clip_layer(block)}.{OPEN_CLIP_BLOCK_NAMES[block[3]]}.{block[4]}"] = value
        elif key in OPEN_CLIP_NAMES:
            converted[OPEN_CLIP_NAMES[key]] = value.T.contiguous() if key in OPEN_CLIP_TRANSPOSED else value
        elif key not in OPEN_CLIP_BUFFERS:
            raise ValueError(
                f"Expected {source} to hold the weights of an open_clip vision transformer, but got the key '{key}'."
            )
    return converted


def open_clip_layer(match: re.Match[str]) -> str:
    """What transformers calls the block of a key."""
    return f"{'vision_model' if match[1] else 'text_model'}.encoder.layers.{match[2]}"


# rewards/hpsv2.py


# Typographic quotes, which open_clip's tokenizer makes straight and transformers' does not.
STRAIGHT_QUOTES = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)


@register_reward("hpsv2.1", "hps", "hpsv2")
class HPSv21(CLIPScore):
    """`cos(image, text)` of HPSv2.1, without CLIP's scale: mostly 0.2 to 0.35.

    "Human Preference Score v2", https://arxiv.org/abs/2306.09341. The published file holds the weights of an open_clip
    ViT-H-14; configuration and tokenizer are those of that CLIP. Images are not cropped but padded, see `PadTransform`.
    Prompts are cleaned as by open_clip's tokenizer (HTML entities, typographic quotes), but for full-width letters,
    ligatures and wrongly decoded text.

    Args:
        model: the CLIP model, with GELU; it is frozen.
        tokenizer: the tokenizer of that model.
        image_transform: images in [0, 1] -> its pixels; by default `PadTransform` at the model's image size.

    Raises:
        ValueError: a model with another activation, such as `CLIPConfig`'s default.
    """

    name = "hpsv2.1"
    range = (-1.0, 1.0)
    license = "apache-2.0"
    default_checkpoint = "xswu/HPSv2"
    weights_file = "HPS_v2.1_compressed.pt"

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        activations = {model.text_model.config.hidden_act, model.vision_model.config.hidden_act}
        if activations != {"gelu"}:
            raise ValueError(
                f"Expected a CLIP model with `hidden_act` 'gelu' for HPSv2, but got {sorted(activations)}: its scores "
                "would be wrong by little. Use the configuration of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."
            )
        edge = cast(int, model.vision_model.config.image_size)
        super().__init__(model, tokenizer, image_transform or PadTransform(edge))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (self.encode_image(images) * self.encode_prompt(prompts)).sum(-1)

    def encode_text(self, prompt: str) -> Tensor:
        """(D,) unit vector of the prompt, cleaned and truncated."""
        text = html.unescape(html.unescape(prompt)).translate(STRAIGHT_QUOTES)
        return super().encode_text(text.strip())

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "HPSv21":
        assert cls.weights_file is not None
        source, source_hub = holder_of("tokenizer_config.json", checkpoint, CLIP_VIT_H, hub)
        tokenizer = AutoTokenizer.from_pretrained(source, **source_hub)
        source, source_hub = holder_of("config.json", checkpoint, CLIP_VIT_H, hub)
        config = CLIPConfig.from_pretrained(source, **source_hub)
        path = checkpoint_path(checkpoint, cls.weights_file, hub)
        return cls(clip_model_from_open_clip(read_state_dict(path), config, path.name), tokenizer)


@register_reward("hpsv2.0")
class HPSv20(HPSv21):
    """HPSv2.0: as `HPSv21`, with the weights that the original package uses when no version is given."""

    name = "hpsv2.0"
    weights_file = "HPS_v2_compressed.pt"


# rewards/image_detail.py


PLAIN_VARIANCE = 4e-4  # that of a standard deviation of 5 grey levels of 255, which is hardly seen
DETAIL_GRID = 16


@register_reward("sharpness")
class Sharpness(Reward):
    """The share of high frequencies, `Σ |∇x|² / (8 Σ (x - mean)²)` over pixels and channels, in [0, 1).

    ∇ are the differences of neighbours. A wave of (u, v) cycles per pixel counts by (sin² πu + sin² πv) / 2: 0 for the
    lowest frequencies and 1 for a checkerboard, whatever the contrast. Blur lowers it, since it takes more of the
    higher ones. The variance counts as at least that of hardly visible noise, so a plain image is not sharp.

    A picture enlarged is less sharp: compare pictures of one size. Noise is sharp, so this is a floor, and no measure
    of quality.
    """

    name = "sharpness"
    requires_prompt = False
    range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        across, down = (images.diff(dim=axis).square().sum((1, 2, 3)) for axis in (-1, -2))
        centred = images - images.mean((-2, -1), keepdim=True)
        spread = centred.square().mean((1, 2, 3)) + PLAIN_VARIANCE
        return (across + down) / (8 * spread * images[0].numel())


@register_reward("complexity")
class Complexity(Reward):
    """The share of the area that is not plain: the mean of `v / (v + 0.02²)` over 16 × 16 cells, in [0, 1).

    v is the variance of a cell's pixels around their mean colour; cells have at least 4 pixels a side. An object before
    a plain background scores the share that it covers, much the same at any resolution and if it is blurred a little:
    that is what `Sharpness` is for. Noise of more than 5 grey levels counts as content.
    """

    name = "complexity"
    requires_prompt = False
    range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        height, width = (max(1, min(DETAIL_GRID, side // 4)) for side in images.shape[-2:])
        centred = images - images.mean((-2, -1), keepdim=True)  # squares of smaller numbers lose fewer digits
        means, squares = (F.adaptive_avg_pool2d(each, (height, width)) for each in (centred, centred.square()))
        variance = (squares - means.square()).mean(1).clamp_min(0)
        return (variance / (variance + PLAIN_VARIANCE)).mean((1, 2))


# rewards/image_reward.py


# From the released code, https://github.com/THUDM/ImageReward
IMAGE_REWARD_MEAN = 0.16717362830052426
IMAGE_REWARD_STD = 1.0333394966054072
IMAGE_REWARD_MAX_LENGTH = 35
IMAGE_REWARD_TOKENIZER = "google-bert/bert-base-uncased"
# The heads of every ViT that BLIP was published with are 64 wide; the tensors do not tell.
IMAGE_REWARD_HEAD_WIDTH = 64

# Names of timm's ViT -> names of `BlipVisionModel`
IMAGE_REWARD_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)
# In the file, but no part of the score: the projections of BLIP's contrastive loss and BERT's position numbers
IMAGE_REWARD_IGNORED = re.compile(
    r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids"
)
# Settings of med_config.json -> those of `BlipTextConfig`, which have the same names
IMAGE_REWARD_TEXT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "pad_token_id",
)


class ImageRewardHead(nn.Module):
    """(B, D) text features -> (B, 1): five linear layers without activations, in float32 or more."""

    def __init__(self, width: int):
        super().__init__()
        # The dropouts do nothing in a score, but they are counted in the names of the published weights.
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = precise_linear(layer, features) if isinstance(layer, nn.Linear) else layer(features)
        return features


@register_reward("imagereward")
class ImageRewardModel(Reward):
    """`(head(f) - mean) / std`, f the text tower's [CLS] feature of the prompt after it has attended to the image.

    ImageReward: https://arxiv.org/abs/2304.05977. The scores are standardised; most lie between -2.3 and 2. The text
    features depend on the image, so only the token ids are kept between calls.

    Args:
        vision_model: the image tower.
        text_model: the text tower with cross-attention, without a pooling layer.
        head: (B, D) features -> (B, 1).
        tokenizer: BERT's, with [DEC] and [ENC] added (see `image_reward_tokenizer`).
        image_transform: images in [0, 1] -> pixels; by default CLIP's transform at the image tower's size.

    Raises:
        ValueError: a text tower that attends to features of another width than the image tower's.
    """

    name = "imagereward"
    license = "apache-2.0"
    default_checkpoint = "THUDM/ImageReward"
    weights_file = "ImageReward.pt"
    parameter_count = 446_206_689
    vision_model: BlipVisionModel
    text_model: BlipTextModel
    head: nn.Module

    def __init__(
        self,
        vision_model: BlipVisionModel,
        text_model: BlipTextModel,
        head: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: Callable[[Tensor], Tensor] | None = None,
    ):
        width, expected = vision_model.config.hidden_size, text_model.config.encoder_hidden_size
        if width != expected:
            raise ValueError(
                f"Expected image features of width {expected}, the `encoder_hidden_size` of the text model, but got a "
                f"vision model of width {width}. Build the text model with `encoder_hidden_size={width}`."
            )
        super().__init__(vision_model=vision_model, text_model=text_model, head=head)
        edge = cast(int, vision_model.config.image_size)
        self.tokens = PromptTokens(tokenizer, IMAGE_REWARD_MAX_LENGTH)
        self.image_transform = image_transform or ImageTransform(size=edge, crop=(edge, edge))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.image_transform(images).to(self.dtype)
        patches = self.vision_model(pixel_values=pixels).last_hidden_state
        ids, mask = self.tokens(prompts, images.device)
        text = self.text_model(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (self.head(text[:, 0])[:, 0] - IMAGE_REWARD_MEAN) / IMAGE_REWARD_STD

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "ImageRewardModel":
        """Read the published `ImageReward.pt` and `med_config.json`; the tokenizer comes from its own repository."""
        parts = convert_image_reward(read_state_dict(checkpoint_path(checkpoint, "ImageReward.pt", hub)))
        settings = read_settings(checkpoint_path(checkpoint, "med_config.json", hub))
        vision_config = image_reward_vision_config(parts["vision"])
        text_config = image_reward_text_config(settings, vision_config.hidden_size)
        # Building draws random weights, from a stream that belongs to the caller.
        with torch.random.fork_rng(devices=[]):
            vision, head = BlipVisionModel(vision_config), ImageRewardHead(text_config.hidden_size)
            text = BlipTextModel(text_config, add_pooling_layer=False)
        for module, part in ((vision, "vision"), (text, "text"), (head, "head")):
            load_strictly(module, parts[part], f"the {part} part of ImageReward.pt")
        # A revision is one of the weights; the tokenizer's repository does not know it.
        return cls(vision, text, head, image_reward_tokenizer({**hub, "revision": None}))


def convert_image_reward(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The published tensors as "vision", "text" and "head", each named as in its module here.

    Raises:
        ValueError: a key of none of these.
    """
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    prefixes = {"blip.visual_encoder.": "vision", "blip.text_encoder.": "text", "mlp.": "head"}
    for key, value in state.items():
        if IMAGE_REWARD_IGNORED.fullmatch(key):
            continue
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(
                f"Expected the keys of ImageReward.pt to begin with {', '.join(prefixes)}, but got '{key}'. Pass the "
                "published file."
            )
        part, name = prefixes[prefix], key.removeprefix(prefix)
        parts[part][image_reward_vision_name(name) if part == "vision" else name] = value
    return parts


def image_reward_vision_name(name: str) -> str:
    """The name in `BlipVisionModel` of a tensor of timm's ViT."""
    for pattern, replacement in IMAGE_REWARD_VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def image_reward_vision_config(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    """The dimensions of the image tower, read off its converted tensors: the checkpoint has no config for it.

    Raises:
        ValueError: naming those tensors that are missing.
    """
    names = ("embeddings.position_embedding", "embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
    if missing := [name for name in names if name not in state]:
        raise ValueError(
            f"Expected ImageReward.pt to hold an image tower, but missing: {', '.join(missing)}. Pass the published "
            "file."
        )
    positions, patches, hidden = (state[name] for name in names)
    depth = len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")})
    return BlipVisionConfig(
        hidden_size=positions.shape[-1],
        intermediate_size=hidden.shape[0],
        num_hidden_layers=depth,
        num_attention_heads=positions.shape[-1] // IMAGE_REWARD_HEAD_WIDTH,
        image_size=round((positions.shape[1] - 1) ** 0.5) * patches.shape[-1],
        patch_size=patches.shape[-1],
        # timm's, and not the default of transformers, 1e-5, which moves the features by 6e-4.
        layer_norm_eps=1e-6,
    )


def image_reward_text_config(settings: Mapping[str, Any], image_width: int) -> BlipTextConfig:
    """med_config.json, a BERT config, as a config of transformers' BLIP; the image tower's width is not the file's.

    Raises:
        ValueError: naming the settings that are missing.
    """
    if missing := [name for name in IMAGE_REWARD_TEXT_SETTINGS if name not in settings]:
        raise ValueError(f"Expected med_config.json to hold a BERT config, but missing: {', '.join(missing)}.")
    own = {name: settings[name] for name in IMAGE_REWARD_TEXT_SETTINGS}
    return BlipTextConfig(**own, encoder_hidden_size=image_width, is_decoder=True)


def image_reward_tokenizer(hub: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """BERT's lower-case tokenizer and the two tokens that BLIP adds: [DEC], then [ENC]."""
    tokenizer = BertTokenizer.from_pretrained(IMAGE_REWARD_TOKENIZER, **hub)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


# rewards/lpips_features.py


@register_features("lpips")
class LPIPSFeatures(Features):
    """LPIPS on a VGG, which its authors recommend as a loss: https://arxiv.org/abs/1801.03924.

    LPIPS of two images is the sum over layers l of the mean over positions of `Σ_c w_lc (f̂a_lc − f̂b_lc)²`, with f̂ the
    activations divided by their norm over channels and w ≥ 0. That is the squared L2 distance of the vectors with the
    entries `√(w_lc / (H_l W_l)) f̂_lc`, which are the features here: N images and M others need N + M passes, not N M.
    Their number grows with the picture (32 million, 130 MB, of 512²), and only pictures of one size can be compared.

    Args:
        model: an `lpips.LPIPS` with linear layers (`lpips=True`, the default) and non-negative weights in them.

    Raises:
        ValueError: a model with negative weights, whose values are no distances.
    """

    name = "lpips"
    metric = "squared_l2"
    license = "bsd-2-clause (layers; torchvision's trunk: bsd-3-clause)"
    package = "lpips"
    parameter_count = 14_716_160
    net = "vgg"
    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model=model)
        lowest = min(weight.min().item() for weight in self.channel_weights())
        if lowest < 0:
            raise ValueError(
                f"Expected LPIPS with non-negative weights of the channels, but got {lowest:.3g}. Use the published "
                "`lpips.LPIPS(pretrained=True)`."
            )

    def channel_weights(self) -> list[Tensor]:
        """(1, C, 1, 1) for each layer."""
        lins: Any = self.model.lins
        return [at_least_float32(lin.model[-1].weight) for lin in lins]

    def encode(self, images: Tensor) -> Tensor:
        model: Any = self.model
        activations = model.net(model.scaling_layer(2 * images - 1).to(self.dtype))
        layers = []
        for activation, weight in zip(activations, self.channel_weights(), strict=True):
            unit = F.normalize(at_least_float32(activation), dim=1, eps=1e-10)
            layers.append((unit * (weight / unit[0, 0].numel()).sqrt()).flatten(1))
        return torch.cat(layers, 1)

    @classmethod
    def load(cls, checkpoint: str | None, hub: dict[str, Any]) -> "LPIPSFeatures":
        """The layers come with the package; torchvision downloads the trunk from pytorch.org to torch's own cache."""
        check_no_checkpoint(cls, checkpoint)
        return cls(import_optional("lpips").LPIPS(net=cls.net, verbose=False))


@register_features("lpips_alex")
class LPIPSAlexFeatures(LPIPSFeatures):
    """LPIPS on an AlexNet, which its authors recommend as a metric."""

    name = "lpips_alex"
    parameter_count = 2_470_848
    net = "alex"


# rewards/pick_score.py


@register_reward("pickscore")
class PickScore(CLIPScore):
    """`exp(logit_scale) * cos(image, text)` of a CLIP that was trained on people's choices, mostly 17 to 24.

    "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", https://arxiv.org/abs/2305.01569.
    The formula and the arguments are those of `CLIPScore`.
    """

    name = "pickscore"
    license = "unstated (code: mit)"
    default_checkpoint = "yuvalkirstain/PickScore_v1"

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "PickScore":
        # As on its model card: what is not the model comes from the CLIP that it was trained from.
        source, source_hub = holder_of("tokenizer_config.json", checkpoint, CLIP_VIT_H, hub)
        tokenizer = AutoTokenizer.from_pretrained(source, **source_hub)
        source, source_hub = holder_of("preprocessor_config.json", checkpoint, CLIP_VIT_H, hub)
        transform = ImageTransform.from_processor_config(source, **source_hub)
        return cls(load_pretrained(CLIPModel, checkpoint, hub), tokenizer, transform)


# rewards/pixel_criteria.py


LUMA_WEIGHTS = (0.299, 0.587, 0.114)
JPEG_QUALITY = 95


@register_reward("brightness")
class Brightness(Reward):
    """Mean luma of the pixels, `0.299 R + 0.587 G + 0.114 B` (ITU-R BT.601, as Pillow's mode "L"), in [0, 1]."""

    name = "brightness"
    requires_prompt = False
    range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((-2, -1)) @ images.new_tensor(LUMA_WEIGHTS)


@register_reward("jpeg_compressibility")
class JPEGCompressibility(Reward):
    """Minus the size of the image as a JPEG file of quality 95, in kilobytes (1000 bytes). No gradient.

    DDPO: https://arxiv.org/abs/2305.13301. The size grows with the area and depends a little on Pillow's JPEG library.
    """

    name = "jpeg_compressibility"
    requires_prompt = False
    differentiable = False

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -jpeg_kilobytes(images)


@register_reward("jpeg_incompressibility")
class JPEGIncompressibility(Reward):
    """The size of the image as a JPEG file of quality 95, in kilobytes (1000 bytes): detail, or noise. No gradient.

    DDPO: https://arxiv.org/abs/2305.13301.
    """

    name = "jpeg_incompressibility"
    requires_prompt = False
    differentiable = False

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return jpeg_kilobytes(images)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """(B, 3, H, W) images in [0, 1] -> (B,) float32, thousands of bytes of each as a JPEG file."""
    arrays = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for array in arrays:
        file = io.BytesIO()
        Image.fromarray(array).save(file, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


# rewards/reward_sum.py


RewardLike = str | os.PathLike[str] | Callable[..., Any]
RewardsLike = RewardLike | Mapping[Any, float] | Sequence[Any]


# the weights that a paper's own code has, by its name: https://arxiv.org/abs/2406.04312
REWARD_PRESETS: dict[str, dict[str, float]] = {
    "reno": {"hpsv2.1": 5.0, "imagereward": 1.0, "clipscore": 0.01, "pickscore": 0.05}
}


@dataclass(frozen=True)
class RewardSumOutput:
    """Scores of B images.

    Attributes:
        total: (B,) float32, the weighted sum, with its gradient.
        components: name -> (B,) float32, each in its own units, unweighted and detached: they are for reporting.
    """

    total: Tensor
    components: dict[str, Tensor]


class AttachedGradient(torch.autograd.Function):
    """Values (B,), or one of the set, with a gradient with respect to images (B, 3, H, W) that is known already."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        if torch.is_grad_enabled():  # asked for by `create_graph=True`
            raise RuntimeError(
                "Expected a first derivative of a `RewardSum` or `SetRewardSum`, whose gradient is a constant once "
                "taken."
            )
        (gradient,) = ctx.saved_tensors
        return gradient * grad_values.to(gradient.dtype).reshape(-1, 1, 1, 1), None, None


class RewardSum(nn.Module):
    """`sum_i weight_i * reward_i(images, prompts)`, higher is better.

    The gradients of the rewards with respect to the pixels are taken one after the other, when the scores are, and only
    their weighted sum is kept: so a decoder and a diffusion model before them are passed once, backwards too, and of
    the rewards' own activations no more than those of the largest are held at any time. It is the gradient of the sum,
    as the score of an image depends on that image alone; it cannot be differentiated again.

    Args:
        rewards: a registered name, Hub id or folder; a `Reward` or any callable `(images, prompts) -> (B,)`; a dict of
            these to weights; a list of them, or of (reward, weight) pairs; another `RewardSum`; or the name of a preset
            in `REWARD_PRESETS`: "reno" has the rewards and weights of the ReNO paper.
        weights: one per entry of a list without pairs; 1 by default. A reward of weight 0 is evaluated and reported,
            not optimised.
        normalization: name -> (mean, std) of a reward that counts as `(score - mean) / std`, as `calibrated` measures
            them: weights then compare rewards of different units. Raw scores are reported all the same.
        dtype, device: of the rewards that are loaded by name.

    Attributes:
        rewards: the rewards, in the order given.
        names: their names; the second `clipscore` becomes `clipscore_2`.
        weights: name -> weight.
        normalization: name -> (mean, std), of those that have one.

    Raises:
        TypeError: something that is no reward.
        ValueError: an unknown name, weights that are negative, not finite, or all zero, or a normalisation that is
            none. Names and weights are checked before anything is loaded.
    """

    def __init__(
        self,
        rewards: RewardsLike,
        weights: Sequence[float] | None = None,
        *,
        normalization: Mapping[str, tuple[float, float]] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        pairs = reward_weight_pairs(rewards, weights)
        for reward, weight in pairs:
            check_reward_pair(reward, weight)
        if not any(weight for _, weight in pairs):
            raise ValueError(
                "Expected a reward with a weight above 0, but all weights are 0: nothing would be optimised."
            )
        self.rewards = nn.ModuleList(as_reward(reward, dtype, device) for reward, _ in pairs)
        self.names = distinct_names([str(reward.name) for reward in self.rewards])
        self.weights = {name: float(weight) for name, (_, weight) in zip(self.names, pairs, strict=True)}
        given = getattr(rewards, "normalization", {}) if normalization is None else normalization
        self.normalization = checked_normalization(given, self.names)

    @property
    def differentiable(self) -> bool:
        """Whether every reward that is optimised has a gradient."""
        return not self.without_gradient()

    @property
    def has_gradient(self) -> bool:
        """Whether any reward that is optimised has a gradient."""
        return any(
            weight and reward.differentiable for weight, reward in zip(self.weights.values(), self.rewards, strict=True)
        )

    @property
    def requires_prompt(self) -> bool:
        return any(reward.requires_prompt for reward in self.rewards)

    def without_gradient(self) -> list[str]:
        """The names of the rewards that are optimised and have no gradient."""
        entries = zip(self.weights.items(), self.rewards, strict=True)
        return [name for (name, weight), reward in entries if weight and not reward.differentiable]

    def check_differentiable(
        self, height: int | None = None, width: int | None = None, prompts: str | None = "a photo"
    ) -> None:
        """What a method with gradients calls before any model runs.

        With the size of the images it also tries each optimised reward on a random image (see `check_gradient`), which
        finds callables that cut the graph.

        Raises:
            NonDifferentiableReward: naming the rewards that give no gradient.
            NonFiniteReward: a score or gradient that is NaN or infinite.
        """
        if names := self.without_gradient():
            raise NonDifferentiableReward(
                f"Expected rewards with a gradient, but {names} are not differentiable. Give them weight 0 to have "
                "them reported only, or use a method without gradients, such as best-of-N."
            )
        if height is not None and width is not None:
            for weight, reward in zip(self.weights.values(), self.rewards, strict=True):
                if weight and isinstance(reward, Reward):
                    check_gradient(reward, prompts, height, width)

    def forward(
        self,
        images: Tensor,
        prompts: str | Sequence[str] | None = None,
        return_dict: bool = True,
        chunk_size: int | None = None,
    ) -> RewardSumOutput | tuple[Tensor, dict[str, Tensor]]:
        """Score (B, 3, H, W) images in [0, 1]; see `Reward.forward` for the other arguments and errors.

        Args:
            chunk_size: score at most so many images at a time, with the memory of so many; `None` for all at once.
        """
        with_gradient = images.requires_grad and torch.is_grad_enabled() and self.has_gradient
        if not isinstance(prompts, (str, type(None))):
            prompts = prompts_per_image(prompts, len(images), self.names[0], False)
        pixels, size = images.detach(), chunk_size or max(1, len(images))
        dtype = torch.promote_types(images.dtype, torch.float32)
        gradient = torch.zeros_like(pixels, dtype=dtype) if with_gradient else None
        parts = []
        for start in range(0, max(1, len(images)), size):
            rows = slice(start, start + size)
            its_gradient = None if gradient is None else gradient[rows]
            parts.append(self.scores(pixels[rows], part_of_prompts(prompts, rows), its_gradient))
        components = {name: torch.cat([part[name] for part in parts]) for name in self.names}
        total = images.new_zeros(len(images), dtype=torch.float32)
        for name, weight in self.weights.items():
            total = total + weight * self.normalized(name, components[name])
        if gradient is not None:
            total = AttachedGradient.apply(images, total, gradient.to(images.dtype))
        return RewardSumOutput(total, components) if return_dict else (total, components)  # pyright: ignore

    def scores(self, images: Tensor, prompts: Any, gradient: Tensor | None) -> dict[str, Tensor]:
        """The scores (B,) by name, detached; the gradient of their weighted sum is added to `gradient` (B, 3, H, W)."""
        components = {}
        for (name, weight), reward in zip(self.weights.items(), self.rewards, strict=True):
            if weight and gradient is not None and reward.differentiable:
                components[name], its_gradient = score_and_gradient(reward, images, prompts)
                gradient.add_(its_gradient, alpha=weight / self.scale(name))
            else:
                components[name] = reward(images, prompts).detach()
        return components

    def normalized(self, name: str, scores: Tensor) -> Tensor:
        mean, std = self.normalization.get(name, (0.0, 1.0))
        return (scores - mean) / std

    def scale(self, name: str) -> float:
        return self.normalization.get(name, (0.0, 1.0))[1]

    def optimised(self) -> "RewardSum":
        """The sum without the rewards of weight 0; weights of the models are shared."""
        parts = zip(self.names, self.rewards, strict=True)
        return self.like({name: reward for name, reward in parts if self.weights[name]})

    def like(self, rewards: Mapping[str, nn.Module]) -> "RewardSum":
        """A sum of rewards by the names of some here, each with the weight and the normalisation of that name.

        Names are given anew: where the first of two `clipscore` is left out, `clipscore_2` becomes `clipscore`.
        """
        names = distinct_names([str(reward.name) for reward in rewards.values()])
        renamed = zip(names, rewards, strict=True)
        normalization = {new: self.normalization[name] for new, name in renamed if name in self.normalization}
        return RewardSum(
            [(reward, self.weights[name]) for name, reward in rewards.items()], normalization=normalization
        )

    @torch.no_grad()
    def calibrated(
        self, images: Tensor, prompts: str | Sequence[str] | None = None, batch_size: int = 8
    ) -> "RewardSum":
        """The same rewards, each in units of its own spread over a calibration set.

        Args:
            images: (N, 3, H, W) in [0, 1], N of at least 2: such as the plain results of your own pipeline and prompts.
            prompts: one per image, or one for all.
            batch_size: how many are scored at once.

        Returns:
            A `RewardSum` of the same rewards and weights; its `normalization` is plain numbers, to be kept and given to
            another `RewardSum`.

        Raises:
            ValueError: fewer than 2 images, or a reward that gives all of them the same score.
        """
        if len(images) < 2:
            raise ValueError(f"Expected at least 2 images to calibrate by, but got {len(images)}.")
        texts = [prompts] * len(images) if prompts is None or isinstance(prompts, str) else list(prompts)
        normalization = {}
        for name, reward in zip(self.names, self.rewards, strict=True):
            parts = range(0, len(images), batch_size)
            scores = [reward(images[i : i + batch_size], as_prompts(texts[i : i + batch_size])) for i in parts]
            std, mean = torch.std_mean(torch.cat(scores).double())
            normalization[name] = (mean.item(), std.item())
        pairs = list(zip(self.rewards, self.weights.values(), strict=True))
        return RewardSum(pairs, normalization=normalization)

    def drop_text_encoders(self, prompts: str | Sequence[str]) -> None:
        """`Reward.drop_text_encoder` of each reward that has one."""
        for reward in self.rewards:
            if hasattr(reward, "drop_text_encoder"):
                reward.drop_text_encoder(prompts)  # pyright: ignore[reportCallIssue]

    def describe(self) -> dict[str, Any]:
        """Weights, and the normalisation if there is one: plain values for the provenance of a result."""
        normalization = {name: list(pair) for name, pair in self.normalization.items()}
        return self.weights | ({"normalization": normalization} if normalization else {})


def score_and_gradient(reward: nn.Module, images: Tensor, prompts: Any) -> tuple[Tensor, Tensor]:
    """Scores (B,), detached, and their gradient (B, 3, H, W) in float32 or better; the graph is freed on return."""
    pixels = at_least_float32(images.detach()).requires_grad_()
    scores = reward(pixels, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels, materialize_grads=True)
    return scores.detach(), gradient


def part_of_prompts(prompts: str | Sequence[str] | None, rows: slice) -> Any:
    """The prompts of some images: those of a list, or the one for all."""
    return prompts if prompts is None or isinstance(prompts, str) else prompts[rows]


def as_prompts(texts: Sequence[str | None]) -> list[str] | None:
    """What a reward takes: a list of prompts, or None where none are given."""
    return None if None in texts else list(texts)  # pyright: ignore[reportReturnType]


def checked_normalization(
    normalization: Mapping[str, Sequence[float]], names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """name -> (mean, std) as floats. Raises `ValueError` for another name, another number of values, or no spread."""
    checked = {}
    for name, values in normalization.items():
        if name not in names:
            raise ValueError(f"Expected a normalisation of rewards out of {list(names)}, but got one of '{name}'.")
        mean, std = (float(value) for value in values) if len(values) == 2 else (math.nan, math.nan)
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(
                f"Expected (mean, std) with a finite mean and a std above 0 for reward '{name}', but got "
                f"{tuple(values)}. Calibrate on images that it scores differently."
            )
        checked[name] = (mean, std)
    return checked


def reward_weight_pairs(rewards: RewardsLike, weights: Sequence[float] | None) -> list[tuple[Any, Any]]:
    """Every accepted form of `rewards=` as a list of (reward, weight)."""
    entries = reward_entries(rewards)
    malformed = [entry for entry in entries if isinstance(entry, tuple) and len(entry) != 2]
    if malformed:
        raise ValueError(f"Expected (reward, weight) pairs, but got {malformed[0]!r}.")
    if not entries:
        raise ValueError("Expected at least one reward, but got none. Pass for example `rewards={'clipscore': 1.0}`.")
    if weights is None:
        return [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in entries]
    if any(isinstance(entry, tuple) for entry in entries):
        raise ValueError(
            "Expected weights once, but got them within `rewards` and as `weights`. Leave one of them out."
        )
    if len(weights) != len(entries):
        raise ValueError(f"Expected {len(entries)} weights, one per reward, but got {len(weights)}.")
    return list(zip(entries, weights, strict=True))


def reward_entries(rewards: RewardsLike) -> list[Any]:
    """The entries of `rewards=`: a reward each, or a (reward, weight) tuple."""
    if isinstance(rewards, str) and rewards in REWARD_PRESETS:
        return list(REWARD_PRESETS[rewards].items())
    if isinstance(rewards, Mapping):
        return list(rewards.items())
    if isinstance(rewards, (list, tuple)):
        return [tuple(entry) if isinstance(entry, list) else entry for entry in rewards]
    # A sum is known by its attributes: a pipeline from the Hub has its own copy of the class.
    parts, weights = getattr(rewards, "rewards", None), getattr(rewards, "weights", None)
    if isinstance(parts, nn.ModuleList) and isinstance(weights, Mapping):
        return list(zip(parts, weights.values(), strict=True))
    return [rewards]


def check_reward_pair(reward: Any, weight: Any) -> None:
    """Raise unless `reward` can become a reward and `weight` is a finite number of at least 0."""
    if isinstance(reward, (str, os.PathLike)):
        find_reward(os.fspath(reward))
    elif isinstance(reward, type):
        raise TypeError(f"Expected a reward, but got the class `{reward.__name__}`. Pass an instance of it.")
    elif not callable(reward):
        raise TypeError(
            f"Expected a reward name, a Hub id, a folder or a callable `(images, prompts) -> (B,)`, but got "
            f"{reward!r}. Weighted rewards are written `{{reward: weight}}` or `[(reward, weight), ...]`."
        )
    name = reward if isinstance(reward, str) else callable_name(reward)
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
        raise ValueError(f"Expected a finite number as the weight of reward '{name}', but got {weight!r}.")
    if weight < 0:
        raise ValueError(
            f"Expected a weight of at least 0 for reward '{name}', but got {weight}. To minimise it, pass a callable "
            "that returns the negated score: `lambda images, prompts: -reward(images, prompts)`."
        )


def as_reward(reward: RewardLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Reward:
    """A name, Hub id or folder is loaded, a plain callable is wrapped, a `Reward` stays as it is."""
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, (str, os.PathLike)):
        return AutoReward.from_pretrained(reward, dtype=dtype, device=device)
    return CallableReward(reward)


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names, with `_2`, `_3` ... appended to those that have been taken."""
    distinct: list[str] = []
    for name in names:
        numbered = (f"{name}_{count}" for count in itertools.count(2))
        distinct.append(name if name not in distinct else next(new for new in numbered if new not in distinct))
    return distinct


# rewards/set_reward_sum.py


SetRewardsLike = str | SetReward | nn.Module | Mapping[Any, Any] | Sequence[Any]


@dataclass(frozen=True)
class SetRewardSumOutput:
    """Values of one set of images.

    Attributes:
        total: a scalar, the weighted sum, with its gradient.
        components: name -> a scalar, each in its own units, unweighted and detached: they are for reporting.
    """

    total: Tensor
    components: dict[str, Tensor]


class SetRewardSum(nn.Module):
    """`sum_i weight_i * set_reward_i(images)`, one number for the whole set, higher is better.

    What is plain is enough, so that it can be given to a pipeline from the Hub:

        {"dpp": 150.0}                                      # name -> weight, on its default features
        {"dpp": ("clip", 150.0), "pairwise": ("lpips", 60.0)}   # name -> (features, weight)
        [("dpp", 150.0), ("dpp", "clip", 50.0)]             # the same reward on two features
        "dpp"                                               # weight 1

    Features are a registered name, a Hub id, a folder or a `Features`. Those of the same name are loaded once, and all
    set rewards on the same features share their forward pass.

    In the memory of one image, whatever their number, with the same gradient: all features without a graph, the
    gradient with respect to them, then one image at a time.

        parts = [total.known_features(image) for image in generated_one_by_one]     # first pass, no graph
        output, gradient = total.gradient(join_features(parts), known)
        for index, image in enumerate(generated_again_with_a_graph):                # second pass
            total.linearized(image, {name: rows[index : index + 1] for name, rows in gradient.items()}).backward()

    Args:
        diversity: one of the above; a `SetReward` in place of a name; or another `SetRewardSum`. A set reward of
            weight 0 is evaluated and reported, not optimised.
        dtype, device: of the features that are loaded by name.

    Attributes:
        rewards: the set rewards, in the order given.
        names: their names; the second `dpp` becomes `dpp_2`.
        weights: name -> weight.
        feature_maps: the features that they look at, each once.
        feature_names: the names of these, under which `features` gives them.

    Raises:
        TypeError: something that is no set reward.
        ValueError: an unknown name, or a weight that is negative or not finite. Names and weights are checked before
            anything is loaded.
    """

    def __init__(
        self,
        diversity: SetRewardsLike,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        entries = set_reward_entries(diversity)
        for entry in entries:
            check_set_reward_entry(*entry)
        rewards = build_set_rewards(entries, dtype, device)
        self.rewards = nn.ModuleList(rewards)
        self.names = distinct_names([str(reward.name) for reward in rewards])
        self.weights = {name: float(weight) for name, (_, _, weight) in zip(self.names, entries, strict=True)}
        maps = list({id(reward.features): reward.features for reward in rewards}.values())
        self.feature_maps = nn.ModuleList(maps)
        self.feature_names = distinct_names([str(each.name) for each in maps])
        names_of = {id(each): name for each, name in zip(maps, self.feature_names, strict=True)}
        self.features_of = {
            name: names_of[id(reward.features)] for name, reward in zip(self.names, rewards, strict=True)
        }

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] to the features (B, ...) of each map, by its name, with their gradient.

        Raises:
            ValueError: images that do not meet the contract.
        """
        return {name: encode(images) for name, encode in self.maps().items()}

    @torch.no_grad()
    def known_features(self, images: Tensor, chunk_size: int = 1) -> dict[str, Tensor]:
        """`features` without a graph, of a few images at a time: those of references, to be kept.

        A set that grows is `join_features([known, total.known_features(new)])`.
        """
        return join_features([self.features(chunk) for chunk in images.split(chunk_size)])

    def forward(
        self,
        images: Tensor,
        references: Tensor | Mapping[str, Tensor] | None = None,
        chunk_size: int | None = None,
    ) -> SetRewardSumOutput:
        """The value of the set of all images and references together.

        Args:
            images: (B, 3, H, W) in [0, 1], on any device.
            references: (M, 3, H, W), images that are given, or their `known_features`: they count and get no gradient.
            chunk_size: pass the features with at most so many images at a time, twice, with the memory of so many; the
                gradient is the same, and cannot be differentiated again. `None` for all at once.

        Raises:
            ValueError: fewer than two images in all, or images that do not meet the contract.
            NonFiniteReward: a value that is NaN or infinite.
        """
        known = self.known_features(references) if isinstance(references, Tensor) else references
        if chunk_size is not None:
            return self.in_chunks(images, known, chunk_size)
        output = self.of_features(self.features(images), known)
        return SetRewardSumOutput(output.total.to(images.device), output.components)

    def in_chunks(self, images: Tensor, references: Mapping[str, Tensor] | None, chunk_size: int) -> SetRewardSumOutput:
        """`forward`: all features without a graph, the gradient in them, then chunk by chunk that in the pixels."""
        features = self.known_features(images.detach(), chunk_size)
        if not (images.requires_grad and torch.is_grad_enabled()):
            output = self.of_features(features, references)
            return SetRewardSumOutput(output.total.to(images.device), output.components)
        output, rows = self.gradient(features, references)
        gradient = torch.empty_like(images)
        for start in range(0, len(images), chunk_size):
            part = slice(start, start + chunk_size)
            gradient[part] = self.pixel_gradient(images[part], {name: each[part] for name, each in rows.items()})
        total = AttachedGradient.apply(images, output.total.to(images.device), gradient)
        return SetRewardSumOutput(total, output.components)  # pyright: ignore[reportArgumentType]

    def pixel_gradient(self, images: Tensor, gradient: Mapping[str, Tensor]) -> Tensor:
        """The gradient of `linearized` with respect to the pixels (B, 3, H, W); its graph is freed on return."""
        leaf = images.detach().requires_grad_()
        value = self.linearized(leaf, gradient)
        if not value.requires_grad:
            return torch.zeros_like(leaf)
        return torch.autograd.grad(value, leaf)[0]

    def of_features(
        self, features: Mapping[str, Tensor], references: Mapping[str, Tensor] | None = None
    ) -> SetRewardSumOutput:
        """The same of features (B, ...) and (M, ...) by name, as `features` and `known_features` give them."""
        for given in (features, references or features):
            self.check_feature_names(given)
        total, components = torch.zeros((), device=features[self.feature_names[0]].device), {}
        for name, reward in zip(self.names, self.rewards, strict=True):
            its_name, weight = self.features_of[name], self.weights[name]
            own = features[its_name] if weight else features[its_name].detach()
            value = reward.of_features(own, None if references is None else references[its_name])  # pyright: ignore[reportCallIssue]
            components[name] = value.detach()
            total = total + weight * value.to(total.device)
        return SetRewardSumOutput(total, components)

    def gradient(
        self, features: Mapping[str, Tensor], references: Mapping[str, Tensor] | None = None
    ) -> tuple[SetRewardSumOutput, dict[str, Tensor]]:
        """The value, and its gradient with respect to the features (B, ...) of each map that is optimised, by name."""
        wanted = {self.features_of[name] for name, weight in self.weights.items() if weight}
        leaves = {name: each.detach().requires_grad_(name in wanted) for name, each in features.items()}
        with torch.enable_grad():
            output = self.of_features(leaves, references)
        named = {name: leaf for name, leaf in leaves.items() if name in wanted}
        gradients = torch.autograd.grad(output.total, list(named.values())) if named else ()
        output = SetRewardSumOutput(output.total.detach(), output.components)
        return output, dict(zip(named, gradients, strict=True))

    def linearized(self, images: Tensor, gradient: Mapping[str, Tensor]) -> Tensor:
        """A scalar whose gradient with respect to some images (B, 3, H, W) of a set is that of the total.

        Args:
            images: the same as the features were taken of.
            gradient: their rows (B, ...) of what `gradient` gave.
        """
        maps = self.maps()
        products = [(maps[name](images) * rows).sum().to(images.device) for name, rows in gradient.items()]
        return torch.stack(products).sum() if products else images.new_zeros(())

    def maps(self) -> dict[str, nn.Module]:
        """The features by name."""
        return dict(zip(self.feature_names, self.feature_maps, strict=True))

    def check_feature_names(self, features: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` unless there are features of each map."""
        if missing := [name for name in self.feature_names if name not in features]:
            raise ValueError(
                f"Expected features of {self.feature_names}, but got those of {list(features)}: {missing} are missing. "
                "Take them of `features(images)` or `known_features(images)` of the same sum."
            )

    def check_differentiable(self) -> None:
        """What a method with gradients calls before any model runs.

        Raises:
            NonDifferentiableReward: naming the set rewards whose features give no gradient.
        """
        entries = zip(self.weights.items(), self.rewards, strict=True)
        names = [name for (name, weight), reward in entries if weight and not reward.features.differentiable]  # pyright: ignore
        if names:
            raise NonDifferentiableReward(
                f"Expected set rewards with a gradient, but the features of {names} are not differentiable. Give them "
                "weight 0 to have them reported only, or use a method without gradients."
            )

    def describe(self) -> dict[str, dict[str, Any]]:
        """name -> its features and its weight: plain values for the provenance of a result."""
        return {name: {"features": self.features_of[name], "weight": weight} for name, weight in self.weights.items()}


def join_features(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Features (B_i, ...) by name of several batches as those (sum of B_i, ...) of one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def set_reward_entries(diversity: SetRewardsLike) -> list[tuple[Any, Any, Any]]:
    """Every accepted form of `diversity=` as a list of (set reward, features or None, weight)."""
    if isinstance(diversity, Mapping):
        pairs = diversity.items()
        entries = [(each, *value) if isinstance(value, (tuple, list)) else (each, value) for each, value in pairs]
    elif isinstance(diversity, (list, tuple)):
        entries = [tuple(each) if isinstance(each, (tuple, list)) else (each, 1.0) for each in diversity]
    elif isinstance(parts := getattr(diversity, "rewards", None), nn.ModuleList):
        # A sum is known by its attributes: a pipeline from the Hub has its own copy of the class.
        entries = list(zip(parts, diversity.weights.values(), strict=True))  # pyright: ignore
    else:
        entries = [(diversity, 1.0)]
    if not entries:
        raise ValueError("Expected at least one set reward, but got none. Pass for example `diversity={'dpp': 150.0}`.")
    return [with_features(entry) for entry in entries]


def with_features(entry: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """(set reward, weight) or (set reward, features, weight) as the latter."""
    if len(entry) not in (2, 3):
        raise ValueError(
            f"Expected a set reward, features if not the default ones, and a weight, but got {entry!r}. Write "
            "`{'dpp': 150.0}`, `{'dpp': ('clip', 150.0)}` or `[('dpp', 'clip', 150.0)]`."
        )
    return entry if len(entry) == 3 else (entry[0], None, entry[1])


def check_set_reward_entry(reward: Any, features: Any, weight: Any) -> None:
    """Raise unless `reward` can become a set reward on `features`, and `weight` is a finite number of at least 0."""
    check_set_reward(reward, features)
    name = reward if isinstance(reward, str) else reward.name
    if isinstance(features, (str, os.PathLike)):
        find_features(os.fspath(features))
    elif features is not None and not isinstance(features, nn.Module):
        raise TypeError(
            f"Expected features for the set reward '{name}' by name, Hub id, folder or as `Features`, but got "
            f"{features!r}. Write (features, weight): `{{'{name}': ('clip', 150.0)}}`."
        )
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight) or weight < 0:
        raise ValueError(
            f"Expected a finite weight of at least 0 for the set reward '{name}', but got {weight!r}. Higher values "
            f"mean more diversity. Write `{{'{name}': 150.0}}`, or `{{'{name}': ('clip', 150.0)}}` on other features."
        )


def check_set_reward(reward: Any, features: Any) -> None:
    """Raise unless `reward` is a registered name, or a set reward that brings its features."""
    if isinstance(reward, str):
        find_set_reward(reward)
    elif isinstance(reward, type) or not (hasattr(reward, "of_features") and isinstance(reward, nn.Module)):
        raise TypeError(
            f"Expected a set reward by name or as an instance of `SetReward`, but got {reward!r}. Weighted ones are "
            "written `{'dpp': 150.0}` or `[('dpp', 150.0), ...]`."
        )
    elif features is not None:
        raise ValueError(
            f"Expected no features beside the set reward '{reward.name}', which brings its own, but got {features!r}. "
            "Leave them out."
        )


def build_set_rewards(
    entries: Sequence[tuple[Any, Any, Any]], dtype: torch.dtype | None, device: torch.device | str | None
) -> list[SetReward]:
    """The set rewards; features that several name are loaded once."""
    loaded: dict[str, Features] = {}

    def load(features: Any) -> Any:
        if not isinstance(features, (str, os.PathLike)):
            return features
        path = os.fspath(features)
        if path not in loaded:
            loaded[path] = AutoFeatures.from_pretrained(path, dtype=dtype, device=device)
        return loaded[path]

    classes = [find_set_reward(reward) if isinstance(reward, str) else None for reward, _, _ in entries]
    return [
        reward if found is None else found(load(features or found.default_features))
        for found, (reward, features, _) in zip(classes, entries, strict=True)
    ]


# rewards/siglip.py


HALF = (0.5, 0.5, 0.5)
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@register_reward("siglip", loads="siglip")
class SigLIP(Reward):
    """`exp(logit_scale) * cos(image, text) + logit_bias`, the logit of "this is the text of this image".

    "Sigmoid Loss for Language Image Pre-Training", https://arxiv.org/abs/2303.15343. Norms, dot product, scale and bias
    are float32 whatever the precision of the weights. Prompts are lower-cased and padded to the length of the context,
    as in training; for the tokenizer of the first SigLIP they also lose their punctuation, as in transformers.

    Args:
        model: the SigLIP model; it is frozen.
        tokenizer: the tokenizer of that model, with an end and a padding token.
        image_transform: images in [0, 1] -> its pixels; by default a squash to the model's image size.
        probability: the sigmoid of the logit, in [0, 1]. It hardly has a gradient where the model is sure.

    Raises:
        ValueError: a tokenizer without one of the two tokens.
    """

    name = "siglip"
    license = "apache-2.0"
    default_checkpoint = "google/siglip-so400m-patch14-384"
    parameter_count = 877_960_498
    text_modules = ("model.text_model",)
    model: SiglipModel

    def __init__(
        self,
        model: SiglipModel,
        tokenizer: PreTrainedTokenizerFast,
        image_transform: Callable[[Tensor], Tensor] | None = None,
        probability: bool = False,
    ):
        super().__init__(model=model)
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError(
                "Expected a tokenizer with an end and a padding token for SigLIP, but got "
                f"{tokenizer.eos_token!r} and {tokenizer.pad_token!r}. Use the tokenizer of this model."
            )
        edge = cast(int, model.vision_model.config.image_size)
        self.tokenizer = tokenizer
        self.image_transform = image_transform or ImageTransform(size=(edge, edge), crop=None, mean=HALF, std=HALF)
        self.probability = probability
        # Numbers and not the parameters, which half precision rounds.
        self.logit_scale = model.logit_scale.detach().double().exp().item()
        self.logit_bias = model.logit_bias.detach().double().item()
        bounds = (self.logit_bias - self.logit_scale, self.logit_bias + self.logit_scale)
        self.range = (0.0, 1.0) if probability else bounds

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        cosine = (self.encode_image(images) * self.encode_prompt(prompts)).sum(-1)
        logits = self.logit_scale * cosine + self.logit_bias
        return logits.sigmoid() if self.probability else logits

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, D) unit vectors, float32."""
        pixels = self.image_transform(images).to(self.dtype)
        return F.normalize(at_least_float32(self.model.vision_model(pixel_values=pixels).pooler_output), dim=-1)

    def encode_text(self, prompt: str) -> Tensor:
        """(D,) unit vector of the prompt, truncated to the length the model was trained with."""
        ids = torch.tensor([self.token_ids(prompt)], device=self.device)
        # No attention mask: padding was seen in training, and the text feature is that of the last position.
        return F.normalize(at_least_float32(self.model.text_model(input_ids=ids).pooler_output), dim=-1)[0]

    def token_ids(self, prompt: str) -> list[int]:
        """The prompt, an end token that truncation does not cut, and padding up to the length of the context.

        End and padding are set here, since repositories differ in whether their tokenizer does it, and on which side.
        """
        length, eos, pad = self.context_length, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        text = prompt.lower()
        # The first SigLIP pads with its end token; SigLIP 2 has the tokenizer of Gemma.
        if eos == pad:
            text = " ".join(text.translate(WITHOUT_PUNCTUATION).split())
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: length - 1] + [eos]
        return ids + [pad] * (length - len(ids))

    @property
    def context_length(self) -> int:
        return self.model.text_model.config.max_position_embeddings

    @classmethod
    def load(cls, checkpoint: str, hub: dict[str, Any]) -> "SigLIP":
        # Not AutoTokenizer: for the first SigLIP it insists on the sentencepiece package.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint, **hub)
        transform = ImageTransform.from_processor_config(checkpoint, **hub)
        return cls(load_pretrained(SiglipModel, checkpoint, hub), tokenizer, transform)


@register_reward("siglip2")
class SigLIP2(SigLIP):
    """`SigLIP` with the weights of "SigLIP 2", https://arxiv.org/abs/2502.14786.

    A folder of these weights is loaded as `SigLIP`, which reads it the same: both have one architecture.
    """

    name = "siglip2"
    default_checkpoint = "google/siglip2-so400m-patch14-384"
    parameter_count = 1_136_008_498


# rewards/soft_tifa.py


SoftTIFAMean = Literal["arithmetic", "geometric", "product"]
NUMERALS = {
    word: str(number)
    for number, word in enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=1
    )
}
Atom = tuple[str, Sequence[str]]


class SoftTIFA(Reward):
    """How probable a vision-language model finds the right answer to each question about a prompt.

    GenEval 2: https://arxiv.org/abs/2512.16853. Each atom is a question and the accepted spellings of its answer; its
    score is the probability that the answer begins with one of them. GenEval 2 takes the arithmetic mean as the measure
    of atoms and the geometric mean as that of whole prompts; their benchmark asks Qwen/Qwen3-VL-8B-Instruct.

    It is not registered, since a name alone has no questions. With the file of the benchmark:

        prompts = load_prompts("geneval2_data.jsonl").prompts
        atoms = {prompt.text: geneval2_atoms(prompt.metadata["vqa_list"]) for prompt in prompts}
        reward = SoftTIFA(VQAScorer.from_pretrained("Qwen/Qwen3-VL-8B-Instruct"), atoms)

    Args:
        scorer: the vision-language model; its own question and mode do not matter.
        atoms: prompt -> its questions, each with the answers that count as right.
        mean: how the atoms of a prompt become one number in [0, 1]. "product" is the probability that all are right.
        instruction: with "{}" for the question.

    Raises:
        ValueError: an unknown mean, an instruction without "{}", or a prompt with no questions.
    """

    name = "soft_tifa"
    range = (0.0, 1.0)
    scorer: VQAScorer

    def __init__(
        self,
        scorer: VQAScorer,
        atoms: Mapping[str, Sequence[Atom]],
        mean: SoftTIFAMean = "geometric",
        instruction: str = "{} Answer in one word.",
    ):
        if mean not in get_args(SoftTIFAMean):
            raise ValueError(f"Expected a mean out of {get_args(SoftTIFAMean)}, but got {mean!r}.")
        if "{}" not in instruction:
            raise ValueError(f"Expected an instruction with {{}} in place of the question, but got {instruction!r}.")
        if empty := [prompt for prompt, questions in atoms.items() if not questions]:
            raise ValueError(f"Expected at least one question for each prompt, but got none for {empty[0]!r}.")
        super().__init__(scorer=scorer)
        self.atoms = dict(atoms)
        self.mean = mean
        self.instruction = instruction
        self.license = scorer.license

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        if unknown := [prompt for prompt in prompts if prompt not in self.atoms]:
            raise ValueError(
                f"Expected prompts whose questions are in `atoms`, but got {unknown[0]!r}. Add its questions, each "
                'with the answers that are right: `{prompt: [("How many pigs are there?", ["two", "2"])]}`.'
            )
        return torch.stack([self.combined(log_p) for log_p in self.atom_log_probabilities(images, prompts)])

    def atom_log_probabilities(self, images: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """For each image the log-probabilities of the right answers to the questions of its prompt, (atoms,)."""
        counts = [len(self.atoms[prompt]) for prompt in prompts]
        asked = [atom for prompt in prompts for atom in self.atoms[prompt]]
        questions = [self.instruction.replace("{}", question) for question, _ in asked]
        repeated = images.repeat_interleave(torch.tensor(counts, device=images.device), 0)
        log_p = self.scorer.answer_log_probability(repeated, questions, [answers for _, answers in asked])
        return list(log_p.split(counts))

    def combined(self, log_p: Tensor) -> Tensor:
        """(atoms,) -> a scalar in [0, 1]."""
        if self.mean == "arithmetic":
            return log_p.exp().mean()
        return (log_p.mean() if self.mean == "geometric" else log_p.sum()).exp()


def geneval2_atoms(vqa_list: Iterable[Sequence[str]]) -> list[tuple[str, list[str]]]:
    """The atoms of a line of GenEval 2: pairs of question and answer, with the spellings that its evaluation accepts.

    Source: `soft_tifa` in https://github.com/facebookresearch/GenEval2, `evaluation.py`.
    """
    atoms = []
    for question, answer in vqa_list:
        if question.startswith("How many"):
            words = [answer, answer.capitalize(), NUMERALS.get(answer, "other")]
        else:
            words = ["Yes", "yes"]
        atoms.append((question, [*words, *(f" {word}" for word in words)]))
    return atoms


# rewards/tiny_image.py


TINY_EDGE = 32


@register_features("tiny_image")
class TinyImage(Features):
    """The 32 × 32 pixels of the shrunken picture over √3072, (B, 3072): their L2 distance is at most 1, black to white.

    `tiny_l2` of It's Never Too Late (https://arxiv.org/abs/2601.00090). Its released code resizes without antialiasing,
    which reads four pixels of each 16 × 16 of a picture of 512², and gives no gradient to the others; here all count.
    """

    name = "tiny_image"
    metric = "l2"

    def encode(self, images: Tensor) -> Tensor:
        pixels = resize(images, (TINY_EDGE, TINY_EDGE), "bilinear", single_pass=True).flatten(1)
        return pixels / math.sqrt(pixels.shape[1])


# rewards/vendi.py


@register_set_reward("vendi")
class Vendi(SetReward):
    """The effective number of different images among all N, references included, in [1, N]; see `vendi_score`.

    Of features at several positions (N, P, D) it is the mean over the positions. The gradient vanishes for exact
    copies and for images at right angles to one another.

    Args:
        features: what the images are compared by.
        order: above 0, `math.inf` is one; by default that of the class, 1. Order 2 needs no eigenvalues and is smooth
            everywhere. The reward of another order is named after it: "vendi_0.5".

    Raises:
        ValueError: an order of 0, which has no gradient, or below.
    """

    name = "vendi"
    order: float = 1.0

    def __init__(self, features: Features, order: float | None = None) -> None:
        super().__init__(features)
        self.order = float(self.order if order is None else order)
        if not self.order > 0:
            raise ValueError(
                f"Expected an order above 0 for the Vendi score as a reward, but got {order}. Order 0, the number of "
                "images that are no copies, has no gradient: use `order=0.1`, or `vendi_score` to measure it."
            )
        self.name = "vendi" if self.order == 1 else f"vendi_{self.order:g}"

    def score(self, features: Tensor) -> Tensor:
        return kernel_vendi(kernels_of_set(features), self.order, torch.finfo(features.dtype).eps).mean()

    def bounds(self, count: int) -> tuple[float, float]:
        return 1.0, float(count)


@register_set_reward("vendi_2")
class VendiOrder2(Vendi):
    """`1 / ‖K / N‖²`, the Vendi score of order 2 (RKE, https://arxiv.org/abs/2211.02242): no eigenvalues, smooth."""

    name = "vendi_2"
    order = 2.0


@register_set_reward("vendi_inf")
class VendiOrderInfinity(Vendi):
    """1 / the largest eigenvalue of K / N: only how much all images have in common counts."""

    name = "vendi_inf"
    order = math.inf


def vendi_score(features: Tensor, q: float = 1.0) -> Tensor:
    """The effective number of different images: exp of the Rényi entropy of the eigenvalues λ of the cosine kernel / N.

    Vendi score (q = 1, Shannon): https://arxiv.org/abs/2210.02410. Other orders: https://arxiv.org/abs/2310.12952,
    `(Σ λ^q)^(1 / (1 - q))`; the smaller the order, the more a rare image counts. Order 0 is the number of eigenvalues
    that are not zero, order ∞ is `1 / max λ`, and order 2 is `1 / ‖K / N‖²`, which needs no eigenvalues.

    Below order 1 an eigenvalue made of rounding errors would count, so those below N · ε · max λ, with the ε of the
    features' type, are taken for zero, as in `torch.linalg.matrix_rank`.

    Args:
        features: (..., N, D), sets of at least 1 image.
        q: the order, at least 0; `math.inf` is one.

    Returns:
        (...) in [1, N], float64, with a gradient, which is zero everywhere for order 0.
    """
    if not q >= 0:
        raise ValueError(f"Expected an order of 0 or more for the Vendi score, but got {q}.")
    return kernel_vendi(cosine_kernel(features), q, torch.finfo(features.dtype).eps)


def kernel_vendi(kernel: Tensor, q: float, features_eps: float) -> Tensor:
    """The Vendi score of order q of (..., N, N) kernels of features whose type has that ε; see `vendi_score`."""
    count = kernel.shape[-1]
    kernel = kernel / count
    if q == 2:
        return 1 / kernel.square().sum((-2, -1))
    shares = torch.linalg.eigvalsh(kernel)
    if q == math.inf:
        return 1 / shares[..., -1]
    return hill_number(shares, q, floor=count * (features_eps if q < 1 else torch.finfo(kernel.dtype).eps))


def hill_number(shares: Tensor, q: float, floor: float) -> Tensor:
    """`(Σ λ^q)^(1 / (1 - q))` of (..., N) shares over those above `floor` times the largest, or its limit for q = 1."""
    counted = shares > floor * shares.amax(-1, keepdim=True)
    # Not the zeros themselves: their logarithm would make the gradient of all others NaN.
    shares = shares.where(counted, 1.0)
    if q == 1:
        return (-(shares * shares.log()).sum(-1)).exp()
    return (shares.pow(q) * counted).sum(-1).pow(1 / (1 - q))


# rewards/views.py


VIEW_SHIFT = 0.05  # of the image's side
VIEW_ZOOM = 0.05
VIEW_NOISE = 0.03  # standard deviation, pixels in [0, 1]


def random_views(images: Tensor, count: int, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Slightly shifted, zoomed and noisy copies of the images, differentiable.

    The gradient of a reward averaged over such views lacks the patterns that please one exact grid of pixels, which is
    how reward hacking begins ("expectation over transformation", Athalye et al., https://arxiv.org/abs/1707.07397).

    Args:
        images: (B, 3, H, W) in [0, 1].
        count: How many views.
        seeds: B integers: the views of an image depend on its own seed alone.

    Yields:
        `count` tensors (B, 3, H, W) in [0, 1], moved by up to 5% of the side, zoomed by up to 5%, with noise of 0.03.
    """
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(count):
        chance = torch.stack([torch.rand(3, generator=stream) for stream in streams]) * 2 - 1
        grain = torch.stack([torch.randn(images.shape[1:], generator=stream) for stream in streams])
        affine = torch.zeros(len(images), 2, 3)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 + VIEW_ZOOM * chance[:, 0]
        affine[:, :, 2] = 2 * VIEW_SHIFT * chance[:, 1:]  # the grid of an image spans 2
        grid = F.affine_grid(affine, list(images.shape), align_corners=False).to(images)
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        yield (moved + VIEW_NOISE * grain.to(images)).clamp(0, 1)


# schedulers/noise_samplers.py


Generators = torch.Generator | list[torch.Generator] | None
NoiseSamplerSpec = str | Mapping[str, Any] | Callable[..., torch.Tensor]

NOISE_SAMPLERS: dict[str, Callable[..., Any]] = {}


class NoiseSampler:
    """Draws initial noise: the white noise that diffusers draws for the same generators, mapped by `color`.

    So each sampler leaves a generator where white noise leaves it. Any callable with the arguments of `__call__` is
    taken as a noise sampler too.
    """

    name: ClassVar[str | None] = None

    def __call__(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Draw noise of a shape `(B, C, H, W)`: spatial, before any scaling or packing.

        Args:
            shape: That of the noise; `(B, 1, C, H, W)` and other shapes that end in height and width do too.
            generator: One for the batch, or a list of one for each sample, which makes samples independent of the batch
                they are drawn in. CPU generators draw on the CPU and move the noise to `device`.
            device: Where the noise goes; by default where the generator is.
            dtype: What the noise is drawn in; float32 by default.

        Raises:
            ValueError: for a list of generators that has another length than the batch, and a shape without images.
        """
        streams = generator if isinstance(generator, list) else [generator]
        if len(streams) not in (1, shape[0]):
            raise ValueError(f"Expected one generator, or one for each of {shape[0]} samples, but got {len(streams)}.")
        if device is None and streams[0] is not None:
            device = streams[0].device
        device = None if device is None else torch.device(device)
        return self.color(randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype))

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """White noise to this noise: same shape, dtype and device."""
        raise NotImplementedError(f"{type(self).__name__} must define `color(white)`.")

    def within(self, groups: Sequence[int]) -> "NoiseSampler":
        """This sampler for a batch with the given groups: one integer for each sample, equal where prompts are."""
        return self

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain values, which `as_noise_sampler` takes if the sampler is registered."""
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        values = {field.name: getattr(self, field.name) for field in fields}
        plain_values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"name": self.name or type(self).__name__, **plain_values}


def register_noise_sampler(name: str):
    """Class decorator: make a noise sampler known by name. The same class may come again, as when code is reloaded."""

    def register(cls):
        known = NOISE_SAMPLERS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"Expected a free noise sampler name, but {name!r} is taken by {known.__qualname__}.")
        NOISE_SAMPLERS[name], cls.name = cls, name
        return cls

    return register


def list_noise_samplers() -> list[str]:
    """The names that `noise_sampler=` takes."""
    return sorted(NOISE_SAMPLERS)


def as_noise_sampler(sampler: NoiseSamplerSpec | None) -> Callable[..., torch.Tensor] | None:
    """A noise sampler by name (`"pink"`), by name and settings (`{"name": "pink", "alpha": 0.3}`), or as it is.

    Raises:
        ValueError: for an unknown name, and for settings that the sampler does not have or cannot take.
        TypeError: for what is none of these.
    """
    if isinstance(sampler, str):
        return named_noise_sampler(sampler, {})
    if isinstance(sampler, Mapping):
        settings = dict(sampler)
        return named_noise_sampler(settings.pop("name", None), settings)
    if sampler is None or (callable(sampler) and not isinstance(sampler, type)):
        return sampler
    raise TypeError(
        f"Expected a noise sampler such as `PinkNoise(0.2)`, one of the names {list_noise_samplers()} or a dict such "
        f'as {{"name": "pink", "alpha": 0.3}}, but got {sampler!r}.'
    )


def named_noise_sampler(name: str | None, settings: dict[str, Any]) -> Callable[..., torch.Tensor]:
    if name not in NOISE_SAMPLERS:
        raise ValueError(
            f"Expected the name of a noise sampler out of {list_noise_samplers()}, but got {name!r}. For settings pass "
            'a dict such as {"name": "pink", "alpha": 0.3}.'
        )
    known = list(inspect.signature(NOISE_SAMPLERS[name]).parameters)
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"Expected settings of the noise sampler {name!r} out of {known}, but got {unknown}.")
    return NOISE_SAMPLERS[name](**settings)


def describe_noise_sampler(sampler: Callable[..., torch.Tensor] | None) -> dict[str, Any] | None:
    """Name and settings of a noise sampler in plain values; of a foreign one its name; `None` for `None`."""
    if sampler is None:
        return None
    if hasattr(sampler, "describe"):
        return sampler.describe()  # pyright: ignore[reportFunctionMemberAccess]
    return {"name": getattr(sampler, "__qualname__", type(sampler).__qualname__)}


@register_noise_sampler("white")
@dataclasses.dataclass(frozen=True)
class WhiteNoise(NoiseSampler):
    """Standard Gaussian noise, bit for bit what a stock pipeline draws."""

    def color(self, white: torch.Tensor) -> torch.Tensor:
        return white


@register_noise_sampler("pink")
@dataclasses.dataclass(frozen=True)
class PinkNoise(NoiseSampler):
    """White noise with amplitudes times (1 + f)^-α, by default each channel of each sample at mean 0 and variance 1.

    It's Never Too Late, https://arxiv.org/abs/2601.00090, eq. 7: images of one prompt differ more from pink noise. f is
    the distance from frequency zero in index units, that is in waves for each side of the noise, not for each pixel.
    Phases are those of the white noise of the same generators. The variance is the unbiased one, so the squared norm of
    a channel is H·W − 1: what white noise has on average without its mean.

    Args:
        alpha: α, any finite number: above 0 favours low frequencies (the paper takes 0.2 and finds patches above 0.3),
            below 0 is blue noise. 0 is white noise that is still standardised in each channel; take `WhiteNoise` for
            the stock draw.
        reference_size: Side of the noise, in its own entries, at which f is the paper's; `None` for any. f then counts
            waves per `reference_size` entries, f = reference_size · √((u/H)² + (v/W)²), so that α gives the same
            spectrum per entry at all sizes; without, larger noises are shaped more.
        band: (low, high) in the units of f: the slope is limited to this band.
        outside: What becomes of frequencies outside the band: "flat" continues the gain that it has at the edge, "zero"
            leaves noise of the band alone.
        standardize: `False` scales by the standard deviation over all draws instead of that of each channel, and keeps
            the means, that is f = 0: so the noise is exactly Gaussian. In small latents the means decide much of an
            image: of 8 × 8 entries, without them images of a prompt are far more alike.

    Raises:
        ValueError: for settings that cannot work.
    """

    alpha: float = 0.2
    _: dataclasses.KW_ONLY
    reference_size: float | None = None
    band: Sequence[float] | None = None
    outside: Literal["flat", "zero"] = "flat"
    standardize: bool = True

    def __post_init__(self) -> None:
        if not is_finite_number(self.alpha):
            raise ValueError(f"Expected `alpha` to be a finite number, but got {self.alpha!r}. The paper takes 0.2.")
        if self.reference_size is not None and not (is_finite_number(self.reference_size) and self.reference_size > 0):
            raise ValueError(f"Expected `reference_size` to be a number above 0, but got {self.reference_size!r}.")
        if self.outside not in ("flat", "zero"):
            raise ValueError(f'Expected `outside` to be "flat" or "zero", but got {self.outside!r}.')
        if self.band is not None:
            object.__setattr__(self, "band", checked_band(self.band))
        elif self.outside == "zero":
            raise ValueError('Expected a `band` beside `outside="zero"`, but got none. Pass `band=(low, high)`.')

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """White noise `(B, C, H, W)` to pink noise of its phases, in its dtype; computed in float32 or better.

        Raises:
            ValueError: for noise that is not spatial, and for sizes that have no frequency in the band.
        """
        check_spatial(white.shape)
        size = white.shape[-2:]
        exact = white.to(torch.promote_types(white.dtype, torch.float32))
        gain = self.gain(*size).to(exact.dtype).to(exact.device)
        pink = torch.fft.irfft2(torch.fft.rfft2(exact) * gain, s=size)
        spread = pink.std((-2, -1), keepdim=True) if self.standardize else expected_std(gain, *size)
        return (pink / spread.clamp_min(torch.finfo(pink.dtype).tiny)).to(white.dtype)

    def gain(self, height: int, width: int) -> torch.Tensor:
        """The factor of each entry of `rfft2`, `(H, W // 2 + 1)` float64, scaled to a largest of 1.

        That of frequency zero is 0 where channels are standardised: their mean is taken away in any case, and so before
        it can cost precision.
        """
        f = self.frequency(height, width)
        low, high = self.band or (0.0, math.inf)
        shaped = f > 0 if self.standardize else f >= 0
        if self.outside == "zero":
            shaped &= (f >= low) & (f <= high)
        if not shaped.any():
            raise ValueError(
                f"Expected a `band` with frequencies of noise of {height}×{width}, which go up to {f.max():.4g}, but "
                f"got {tuple(self.band or ())}. Widen it."
            )
        logs = -self.alpha * f.clamp(low, high).log1p()
        return torch.where(shaped, (logs - logs[shaped].max()).exp(), 0.0)

    def frequency(self, height: int, width: int) -> torch.Tensor:
        """f of each entry of `rfft2`, `(H, W // 2 + 1)` float64."""
        rows = torch.fft.fftfreq(height, dtype=torch.float64) * (self.reference_size or height)
        columns = torch.fft.rfftfreq(width, dtype=torch.float64) * (self.reference_size or width)
        return torch.hypot(rows[:, None], columns)


def expected_std(gain: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The standard deviation of each entry of white noise `(height, width)` times a `gain` of its `rfft2`, a scalar."""
    copies = torch.full_like(gain, 2.0)  # `rfft2` leaves out the mirrored half of the columns
    copies[:, 0] = 1
    copies[:, -1] = 2 - (width % 2 == 0)
    return (gain.square() * copies).sum().div(height * width).sqrt()


@register_noise_sampler("coupled")
@dataclasses.dataclass(frozen=True)
class CoupledNoise(NoiseSampler):
    """Noises that are Gaussian each, and as negatively correlated as K noises can be: their sum is zero.

    `z_i = √(1−ρ)·(g_i − ḡ) + √(1+(K−1)ρ)·ḡ`, the symmetric square root of the covariance (1−ρ)I + ρ11ᵀ, for each entry
    of K white noises g. At ρ = −1/(K−1) that is √(K/(K−1))·(g_i − ḡ), and for K = 2 the antithetic pair (z, −z). Couple
    to Control, https://arxiv.org/abs/2605.11311: sets differ more, at no cost, while each image has its own law.

    Args:
        group_size: K: each K samples in a row are coupled; at least 2. By default all of the batch are, and in a
            pipeline those that share their prompt.
        correlation: ρ in [−1/(K−1), 1]; −1/(K−1) by default.
        groups: Instead of `group_size`: one integer for each sample, equal where samples are coupled.

    Raises:
        ValueError: for settings that cannot work.
    """

    group_size: int | None = None
    _: dataclasses.KW_ONLY
    correlation: float | None = None
    groups: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None and not (isinstance(self.group_size, int) and self.group_size >= 2):
            raise ValueError(f"Expected `group_size` to be an integer of 2 or more, but got {self.group_size!r}.")
        if self.group_size is not None and self.groups is not None:
            raise ValueError("Expected `group_size` or `groups`, but got both. Leave one out.")
        if self.correlation is not None and not (is_finite_number(self.correlation) and -1 <= self.correlation <= 1):
            raise ValueError(f"Expected `correlation` to be in [-1/(K-1), 1], but got {self.correlation!r}.")
        if self.groups is not None:
            object.__setattr__(self, "groups", tuple(self.groups))

    def color(self, white: torch.Tensor) -> torch.Tensor:
        """White noises `(B, ...)` to coupled ones, in their dtype; computed in float32 or better.

        Raises:
            ValueError: for a batch that the groups do not fit, and a correlation that K samples cannot have.
        """
        exact = white.to(torch.promote_types(white.dtype, torch.float32))
        coupled = torch.empty_like(exact)
        for rows in self.coupled_rows(len(white)):
            coupled[rows] = self.couple_all(exact[rows])
        return coupled.to(white.dtype)

    def couple_all(self, white: torch.Tensor) -> torch.Tensor:
        """`(K, ...)` white noises to K coupled ones."""
        rho, others, mean = self.correlation, len(white) - 1, white.mean(0, keepdim=True)
        if rho is None:
            return math.sqrt(len(white) / others) * (white - mean)
        return math.sqrt(1 - rho) * (white - mean) + math.sqrt(max(1 + others * rho, 0.0)) * mean

    def coupled_rows(self, batch: int) -> list[list[int]]:
        """The samples of each group, by their places in the batch."""
        if self.groups is not None and len(self.groups) != batch:
            raise ValueError(f"Expected `groups` of {batch} integers, one for each sample, but got {len(self.groups)}.")
        if self.group_size is not None and batch % self.group_size:
            raise ValueError(f"Expected a batch in groups of {self.group_size}, but got {batch} samples.")
        labels = self.groups or [index // (self.group_size or max(batch, 1)) for index in range(batch)]
        found = [[row for row in range(batch) if labels[row] == label] for label in dict.fromkeys(labels)]
        for rows in found:
            self.check_group(len(rows))
        return found

    def check_group(self, count: int) -> None:
        if count < 2:
            raise ValueError(
                "Expected at least 2 samples in each group of coupled noise, but got 1. Pass `num_images_per_prompt=2` "
                "or more, or `group_size` to couple images of different prompts."
            )
        lowest = -1 / (count - 1)
        if self.correlation is not None and self.correlation < lowest - 1e-12:
            raise ValueError(
                f"Expected `correlation` of {count} samples to be at least {lowest:.4g}, but got {self.correlation!r}. "
                "Leave it out for the lowest."
            )

    def within(self, groups: Sequence[int]) -> "CoupledNoise":
        """Coupled within the given groups, unless the sampler has its own. Raises `ValueError` where that fails."""
        own = self.group_size is not None or self.groups is not None
        bound = self if own else dataclasses.replace(self, groups=tuple(groups))
        bound.coupled_rows(len(groups))
        return bound


def is_finite_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def checked_band(band: Sequence[float]) -> tuple[float, float]:
    """A band as a tuple. Raises `ValueError` unless it is (low, high) with 0 <= low < high."""
    limits = tuple(band) if isinstance(band, Sequence) else ()
    if len(limits) == 2 and is_finite_number(limits[0]) and isinstance(limits[1], Real) and 0 <= limits[0] < limits[1]:
        return limits
    raise ValueError(f"Expected `band` to be (low, high) with 0 <= low < high, but got {band!r}.")


def check_spatial(shape: Sequence[int]) -> None:
    if len(shape) < 4 or shape[-2] * shape[-1] < 2:
        raise ValueError(
            f"Expected noise of shape (B, C, H, W), with H·W of 2 or more, but got {tuple(shape)}. Draw packed latents "
            "before they are packed."
        )


# callbacks/noise_state.py


@dataclasses.dataclass(eq=False)
class NoiseState:
    """A running optimisation of `B` independent noises.

    Attributes:
        pipeline: The pipeline whose noise is optimised.
        prompts: The `B` prompts that rewards are asked about.
        steps: How many evaluations the method plans.
        noise: `(B, C, H, W)`, unit variance, the noise that was evaluated in this step.
        step: Index of this evaluation, from 0: step 0 is the plain result.
        images: `(B, 3, H, W)` in [0, 1], what the noise draws; `None` if the objective did not ask for images.
        loss: `(B,)`, lower is better, without the regularizer.
        scores: Name to `(B,)`, the raw rewards of this step, higher is better.
        best_loss: `(B,)`, the lowest loss so far.
        best_step: `(B,)`, the step of the lowest loss.
        best_noise: `(B, C, H, W)`, the noise of the lowest loss.
        best_images: `(B, 3, H, W)` or `None`, the images of the lowest loss.
        active: `(B,)` bool. A sample that is not active keeps its best and is not recorded any more.
        reports: What callbacks have to say in the result, by name: plain values.
        stopped: Why the run ended before its last step, or `None`.
    """

    pipeline: Any
    prompts: list[str]
    steps: int
    noise: torch.Tensor
    step: int = -1
    images: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    scores: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    best_loss: torch.Tensor | None = None
    best_step: torch.Tensor | None = None
    best_noise: torch.Tensor | None = None
    best_images: torch.Tensor | None = None
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)
    active: torch.Tensor = dataclasses.field(init=False)
    stopped: str | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.active = torch.ones(len(self.noise), dtype=torch.bool, device=self.noise.device)

    @property
    def elapsed(self) -> float:
        """Seconds since the optimisation began."""
        return time.perf_counter() - self.started

    def stop(self, reason: str = "callback", samples: torch.Tensor | None = None) -> None:
        """End the run after this step, or only for the samples where the `(B,)` bool mask `samples` is true."""
        self.active = self.active & ~samples if samples is not None else torch.zeros_like(self.active)
        if not self.active.any():
            self.stopped = reason


# callbacks/noise_callback.py


class NoiseCallback:
    """Base of callbacks per *optimisation* step. (diffusers' `callback_on_step_end` is per denoising step.)

    Subclasses override what they need. A plain function `(state) -> bool | None` does where one hook is enough.
    """

    def on_run_start(self, state: NoiseState) -> None:
        """Called once, before the first evaluation."""

    def on_step_end(self, state: NoiseState) -> bool | None:
        """Called after each evaluation. Return `False`, or call `state.stop()`, to end the run."""

    def on_run_end(self, state: NoiseState) -> None:
        """Called once at the end, also when the run ends in an exception."""


class FunctionCallback(NoiseCallback):
    """A plain function as a callback."""

    def __init__(self, function: Callable[[NoiseState], bool | None]) -> None:
        self.function = function

    def on_step_end(self, state: NoiseState) -> bool | None:
        return self.function(state)


CallbackSpec = NoiseCallback | Callable[[NoiseState], bool | None]


def as_callbacks(callbacks: CallbackSpec | Iterable[CallbackSpec] | None) -> list[NoiseCallback]:
    """One callback, several, or none, as a list. Raises `TypeError` for what is neither callback nor function.

    Anything with an `on_step_end` counts, whichever copy of `NoiseCallback` it derives from.
    """
    if callbacks is None:
        return []
    if isinstance(callbacks, Iterable):
        return [as_callback(each) for each in callbacks]
    return [as_callback(callbacks)]


def as_callback(callback: CallbackSpec) -> NoiseCallback:
    if hasattr(callback, "on_step_end"):
        return callback  # pyright: ignore[reportReturnType]
    if callable(callback):
        return FunctionCallback(callback)
    raise TypeError(
        f"Expected a callback with `on_step_end(state)` or a function of `state`, but got {type(callback).__name__}."
    )


# pipelines/agreement.py


def plain_description(value: Any) -> Any:
    """Any setting as a value that JSON takes, equal for equal settings.

    A tensor becomes the hash of its numbers, an object what it says of itself in `describe()`, else its name and type.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain_description(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_description(each) for each in value]
    if isinstance(value, torch.Tensor):
        return tensor_description(value)
    if hasattr(value, "describe"):
        return plain_description(value.describe())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_description(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"type": type(value).__qualname__, "name": str(getattr(value, "name", getattr(value, "__qualname__", "")))}


def tensor_description(tensor: torch.Tensor) -> dict[str, Any]:
    numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": hashlib.sha256(numbers).hexdigest()}


def differences(known: Any, given: Any, name: str = "") -> list[str]:
    """Each value in which two nested dictionaries differ, in words."""
    if isinstance(known, dict) and isinstance(given, dict):
        names = [*known, *(key for key in given if key not in known)]
        found = [differences(known.get(key), given.get(key), f"{name} {key}".strip()) for key in names]
        return [difference for group in found for difference in group]
    return [] if known == given else [f"{name} was {known!r} and is {given!r}"]


# pipelines/whole_file.py


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there as a whole or not at all, whenever the process ends.

    If the writing ends in an exception, Ctrl-C among them, what was there before is still there, and nothing else.
    """
    part = part_of_file(path)
    try:
        write(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def part_of_file(path: Path) -> Path:
    """Where a file is written before it is moved to its place: a name of the same kind in the same folder."""
    return path.with_name(f".part-{path.name}")


# pipelines/result_file.py


RESULT_FORMAT = "noiseopt-result-1"
RESULT_HEADER = {"format": str, "provenance": dict, "generator_devices": list, "reports": dict}
RESULT_TENSORS = ("noise", "latents", "losses", "norms", "best_step")
PROVENANCE: dict[str, type] = {"method": str, "pipeline": str, "generators": str, "dtype": str}
PROVENANCE |= {"settings": dict, "scheduler": dict, "arguments": dict, "prompts": list, "seeds": list}
LATER_TENSORS = ("initial_noise", "band_changes")  # which files of older versions lack
PER_SCORE, PER_STREAM = "scores.", "generator_states."
NOISE_DTYPES = (torch.float32, torch.float64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, *NOISE_DTYPES)
CUDA_STATE_BYTES, MOST_STATE_BYTES = 16, 1024  # generators of accelerators count; that of the CPU has 5056 bytes
TORCH_FILES = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(6)))  # a zip, and pickles

Header = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class UnusableResult(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


def write_result_file(path: Path, tensors: Tensors, header: Header) -> None:
    """Write both so that the file is there as a whole or not at all; the format is added."""
    metadata = {"noiseopt": json.dumps({"format": RESULT_FORMAT, **header})}
    # clones: safetensors refuses tensors that share memory, as noise and latents do in float32
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: save_file(copies, part, metadata=metadata))


def read_result_file(path: Path) -> tuple[Header, Tensors]:
    """What `write_result_file` wrote, on the CPU. Nothing is unpickled, whatever the file is.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: For any other file, naming it and what is wrong.
    """
    if not path.exists():
        raise FileNotFoundError(f"Expected a file that `NoiseResult.save` wrote, but there is no {path}.")
    try:
        header, tensors = read_checked(path)
    except UnusableResult as problem:
        raise ValueError(f"Expected a file that `NoiseResult.save` wrote, but {path} {problem}.") from None
    return header, tensors


def read_checked(path: Path) -> tuple[Header, Tensors]:
    if not path.is_file():
        raise UnusableResult("is a folder" if path.is_dir() else "is not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            header = parsed_header(file.metadata() or {})
            check_names(set(file.keys()), header)  # before the tensors, which may be large
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise UnusableResult(why_unreadable(path, error)) from None
    check_tensors(tensors)
    check_streams(tensors, header)
    check_provenance(header["provenance"], tensors)
    return header, tensors


def why_unreadable(path: Path, error: Exception) -> str:
    """What a file seems to be that is no safetensors file; it is looked at, and nothing in it is executed."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "is empty"
    if start.startswith(TORCH_FILES) and isinstance(error, SafetensorError):
        return "is a pickle or a file of `torch.save`, which may execute anything and is not opened"
    return f"is no whole safetensors file ({str(error).strip().partition(chr(10))[0].rstrip('.')})"


def parsed_header(metadata: dict[str, str]) -> Header:
    try:
        header = json.loads(metadata.get("noiseopt", "{}"))
    except (ValueError, RecursionError):
        raise UnusableResult("has a header that is no JSON") from None
    found = header.get("format") if isinstance(header, dict) else None
    if isinstance(found, str) and re.fullmatch(r"noiseopt-result-[2-9]|noiseopt-result-[1-9]\d+", found):
        raise UnusableResult(f"was written by a newer noiseopt, which calls its format {found}. Update noiseopt")
    if found != RESULT_FORMAT:
        raise UnusableResult(f"has no {RESULT_FORMAT} header")
    unknown = sorted((metadata.keys() - {"noiseopt"}) | (header.keys() - RESULT_HEADER.keys()))
    if unknown:
        raise UnusableResult(f"has unknown metadata {brief(unknown)}")
    header.setdefault("reports", {})  # which the first files lack
    wrong = [name for name, kind in RESULT_HEADER.items() if not isinstance(header.get(name), kind)]
    if wrong:
        raise UnusableResult(f"has metadata that are missing or of another type: {brief(wrong)}")
    return header


def check_names(names: set[str], header: Header) -> None:
    """That the tensors are those of a result, with one state for each random stream."""
    streams = {f"{PER_STREAM}{index}" for index in range(len(header["generator_devices"]))}
    if missing := sorted((streams | set(RESULT_TENSORS)) - names):
        raise UnusableResult(f"lacks the tensors {brief(missing)}")
    known = {*RESULT_TENSORS, *LATER_TENSORS, *streams}
    if unknown := sorted(name for name in names - known if not name.startswith(PER_SCORE)):
        raise UnusableResult(f"has unknown tensors {brief(unknown)}")


def check_tensors(tensors: Tensors) -> None:
    """That dtypes and shapes are those of `B` noises and of as many steps, and all noises are finite."""
    noise, steps = tensors["noise"], tensors["losses"].shape[:1]
    if noise.ndim < 2 or not noise.numel() or not steps or not steps[0]:
        losses = tuple(tensors["losses"].shape)
        raise UnusableResult(f"has a noise of shape {tuple(noise.shape)} and losses of shape {losses}")
    batch, rows = noise.shape[:1], (*steps, *noise.shape[:1])
    shapes = {"losses": rows, "norms": rows, "best_step": batch, "initial_noise": noise.shape}
    shapes |= {"band_changes": (*rows, 3)} | {name: rows for name in tensors if name.startswith(PER_SCORE)}
    for name, tensor in tensors.items():
        if name in shapes and tensor.shape != torch.Size(shapes[name]):
            raise UnusableResult(
                f"has '{name}' of shape {tuple(tensor.shape)}, where {tuple(shapes[name])} goes with the others"
            )
        if not name.startswith(PER_STREAM) and tensor.dtype not in dtypes_of(name):
            raise UnusableResult(f"has '{name}' of {tensor.dtype}")
    latents = tensors["latents"]
    if latents.shape[:1] != batch or latents.ndim < 2 or not latents.numel():
        raise UnusableResult(f"has latents of shape {tuple(latents.shape)} for noise of {tuple(noise.shape)}")
    check_values(tensors, steps[0])


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    if name == "best_step":
        return (torch.int64,)
    return NOISE_DTYPES if name in ("noise", "initial_noise") else FLOAT_DTYPES


def check_values(tensors: Tensors, steps: int) -> None:
    """That what is drawn from is finite, and the best step is one. (Losses of a sample that stopped are NaN.)"""
    for name in ("noise", "latents", "initial_noise"):
        if name in tensors and not tensors[name].isfinite().all():
            raise UnusableResult(f"has '{name}' with values that are not finite")
    best = tensors["best_step"]
    if best.min() < 0 or best.max() >= steps:
        raise UnusableResult(f"has the best steps {brief(best.tolist())}, but {steps} steps")


def check_streams(tensors: Tensors, header: Header) -> None:
    """That there are as many random streams as the run had, each with a state that its generator takes."""
    devices, several = header["generator_devices"], header["provenance"].get("generators") == "list"
    expected = len(tensors["noise"]) if several else 1
    if devices and len(devices) != expected:
        raise UnusableResult(f"has {len(devices)} generator states, where {expected} go with the others")
    for index, device in enumerate(devices):
        state = tensors[f"{PER_STREAM}{index}"]
        if not isinstance(device, str) or not fits_generator(device, state):
            raise UnusableResult(f"has a generator state that no generator on {device!r} takes")


def fits_generator(device: str, state: torch.Tensor) -> bool:
    """Whether a generator on a kind of device, which need not be here, can have a state."""
    if state.dtype != torch.uint8 or state.ndim != 1 or not re.fullmatch("[a-z_]{1,16}", device):
        return False
    if device != "cpu":
        sizes = (CUDA_STATE_BYTES,) if device == "cuda" else range(1, MOST_STATE_BYTES + 1)
        return is_device(device) and len(state) in sizes
    try:
        torch.Generator().set_state(state.clone())
    except RuntimeError:
        return False
    return True


def is_device(name: str) -> bool:
    """Whether torch knows a kind of device, which need not be here."""
    try:
        return torch.device(name).index is None
    except RuntimeError:
        return False


def check_provenance(provenance: dict[str, Any], tensors: Tensors) -> None:
    """That what is read from it is of the types and numbers that `provenance_of` writes; any of it may be missing."""
    batch = len(tensors["noise"])
    wrong = [name for name, kind in PROVENANCE.items() if not isinstance(provenance.get(name, kind()), kind)]
    wrong += [name for name in ("model", "revision") if not isinstance(provenance.get(name), str | None)]
    if not wrong:
        prompts, seeds = provenance.get("prompts", [""] * batch), provenance.get("seeds", [])
        checks = {
            "prompts": len(prompts) == batch and all(isinstance(each, str) for each in prompts),
            "seeds": len(seeds) in (0, 1, batch) and all(type(each) is int for each in seeds),
            "dtype": isinstance(getattr(torch, provenance.get("dtype", "float32"), None), torch.dtype),
        }
        wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise UnusableResult(f"has a provenance whose {brief(wrong)} cannot be that of its noise")


def brief(values: list[Any]) -> str:
    """The first few of what a stranger may have written at any length."""
    text = ", ".join(str(value) for value in values[:5])
    return text if len(text) <= 200 else text[:200] + "…"


# pipelines/noise_result.py


@dataclasses.dataclass(eq=False, repr=False)
class NoiseResult:
    """What `optimize_noise` returns, for `B` independent noises.

    `pipe(prompt, latents=result.latents, ...)` with the arguments of the run draws the best images again. For a sampler
    that adds noise on the way pass `generator=result.generator()` too.

    Attributes:
        noise: `(B, C, H, W)` float32, unit variance: the best noise, or the last for methods that return it.
        latents: The same as the pipeline takes it as `latents=`: in its dtype, packed where the family packs.
        scores: Name to `(steps, B)`: each reward at each step, raw units, higher is better.
        losses: `(steps, B)`, lower is better, without the regularizer. NaN where a sample had stopped.
        norms: `(steps, B)`, ‖noise‖ / √d at each step: 1 is what a Gaussian has.
        best_step: `(B,)`, the step whose noise is returned.
        provenance: Model, scheduler, dtype, prompts, seeds, versions, method and its settings: plain values.
        reports: What callbacks found, by name, in plain values: see `HeldOutReward`. After a run with `decoder=` also
            "full_decoder": scores and losses by the pipeline's own decoder, of the plain result (`initial_scores`,
            `initial_loss`) and of what is returned (`best_scores`, `best_loss`). `scores` and `losses` are then those
            of the images of that tiny decoder: an approximation.
        generator_states: The state of each random stream after the base noise was drawn.
        initial_noise: `(B, C, H, W)`, the noise of the plain result; `None` in files of versions that did not keep it.
        band_changes: `(steps, B, 3)`, how much of ‖noise − initial_noise‖² lies in the lowest, middle and highest third
            of the radial frequencies at each step; the three add up to it. NaN where a sample had stopped, `None` in
            old files. See `frequency_bands`.
        images: `(B, 3, H, W)` in [0, 1], the images of `noise`, if they were drawn. Not saved.
        initial_images: `(B, 3, H, W)`, the plain result. Not saved.
    """

    noise: torch.Tensor
    latents: torch.Tensor
    scores: dict[str, torch.Tensor]
    losses: torch.Tensor
    norms: torch.Tensor
    best_step: torch.Tensor
    provenance: dict[str, Any]
    generator_states: list[tuple[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)
    initial_noise: torch.Tensor | None = None
    band_changes: torch.Tensor | None = None
    images: torch.Tensor | None = None
    initial_images: torch.Tensor | None = None

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.noise.shape))
        best = ", ".join(f"{name} {values.mean():.4g}" for name, values in self.best_scores.items())
        by = f", by {decoder['class']}" if (decoder := self.provenance.get("decoder")) else ""
        return f"NoiseResult({shape}, best of {len(self.losses)} steps at {self.best_step.tolist()}: {best}{by})"

    @property
    def best_scores(self) -> dict[str, torch.Tensor]:
        """Name to `(B,)`: the rewards of the returned noise."""
        return {name: self.at_best(values) for name, values in self.scores.items()}

    @property
    def initial_scores(self) -> dict[str, torch.Tensor]:
        """Name to `(B,)`: the rewards of the plain result."""
        return {name: values[0] for name, values in self.scores.items()}

    @property
    def best_loss(self) -> torch.Tensor:
        """`(B,)`: the loss of the returned noise."""
        return self.at_best(self.losses)

    @property
    def band_shares(self) -> torch.Tensor | None:
        """`(steps, B, 3)`: `band_changes` as shares of their sum; NaN where nothing has changed."""
        return None if self.band_changes is None else self.band_changes / self.band_changes.sum(-1, keepdim=True)

    def at_best(self, values: torch.Tensor) -> torch.Tensor:
        return values.gather(0, self.best_step.to(values.device)[None])[0]

    def generator(self) -> torch.Generator | list[torch.Generator] | None:
        """Fresh generators that continue where the base noise ended; a list if the run had one for each image."""
        fresh = []
        for device, state in self.generator_states:
            fresh.append(torch.Generator(device))
            fresh[-1].set_state(state)
        return fresh if self.provenance.get("generators") == "list" else (fresh or [None])[0]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the tensors, and the provenance as JSON in its header.

        The file is there as a whole or not at all; if the writing is interrupted, one that was there before stays.
        """
        own = {name: getattr(self, name) for name in RESULT_TENSORS + LATER_TENSORS}
        tensors = {name: tensor for name, tensor in own.items() if tensor is not None}
        tensors |= {f"{PER_SCORE}{name}": values for name, values in self.scores.items()}
        tensors |= {f"{PER_STREAM}{index}": state for index, (_, state) in enumerate(self.generator_states)}
        devices = [device for device, _ in self.generator_states]
        header = {"provenance": self.provenance, "generator_devices": devices, "reports": self.reports}
        write_result_file(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "NoiseResult":
        """Read what `save` wrote. Nothing is unpickled, and nothing is used before all of it is checked.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: For any other file, one of a newer version, and one that was damaged or made to mislead: what
                it holds must be consistent and finite. The message names the file and what is wrong.
        """
        header, tensors = read_result_file(Path(path))
        streams = enumerate(header["generator_devices"])
        states = [(kind, tensors.pop(f"{PER_STREAM}{index}")) for index, kind in streams]
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        names = [name for name in tensors if name.startswith(PER_SCORE)]
        scores = {name.removeprefix(PER_SCORE): tensors.pop(name) for name in names}
        facts = {name: header[name] for name in ("provenance", "reports")}
        return cls(**tensors, **facts, scores=scores, generator_states=states)


# pipelines/image_set_folder.py


IMAGE_SET_FORMAT = "noiseopt-image-set-1"
IMAGE_SET_FILE = "image_set.json"
IMAGE_SET_RECORD = {"prompt": str, "settings": dict, "seeds": list, "values": list}


class ImageSetFolder:
    """`image_set.json`, and `image_000.png` and `image_000.safetensors` for each image that it names.

    An image counts once the JSON has it, which is written last: whenever the process ends, the folder holds a set.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def begun(self) -> bool:
        return (self.path / IMAGE_SET_FILE).exists()

    def file(self, index: int, suffix: str) -> Path:
        return self.path / f"image_{index:03d}{suffix}"

    def check_free(self) -> None:
        """Raise `ValueError` unless a set can begin here."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"Expected a folder for the set, but {self.path} is a file. Choose another name.")
        if self.begun or self.file(0, ".png").exists() or self.file(0, ".safetensors").exists():
            raise ValueError(
                f"Expected a folder without images of another set, but {self.path} has some. Choose another one."
            )

    def write_record(self, record: dict[str, Any]) -> None:
        """Write the JSON; `record` is what `IMAGE_SET_RECORD` names."""
        text = json.dumps({"format": IMAGE_SET_FORMAT, **record}, indent=1, ensure_ascii=False) + "\n"
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / IMAGE_SET_FILE, lambda part: part.write_text(text, encoding="utf-8"))

    def write_image(self, index: int, picture: Image.Image, result: NoiseResult) -> None:
        write_whole(self.file(index, ".png"), picture.save)
        result.save(self.file(index, ".safetensors"))

    def read_record(self) -> dict[str, Any]:
        """What `write_record` wrote. Raises `ValueError` for anything else."""
        file = self.path / IMAGE_SET_FILE
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self.refusal(file, str(error)) from None
        if not isinstance(record, dict) or record.pop("format", None) != IMAGE_SET_FORMAT:
            raise self.refusal(file, f"it has no format {IMAGE_SET_FORMAT!r}")
        if unknown := sorted(record.keys() - IMAGE_SET_RECORD.keys()):
            raise self.refusal(file, f"it has unknown entries {unknown[:3]}")
        if wrong := [name for name, kind in IMAGE_SET_RECORD.items() if not isinstance(record.get(name), kind)]:
            raise self.refusal(file, f"{wrong} are missing or of another type")
        seeds, values = record["seeds"], record["values"]
        if len(seeds) != len(values) or not all(type(seed) is int for seed in seeds):
            raise self.refusal(file, "it has not one seed and one row of values for each image")
        if not all(isinstance(row, dict) and is_row(row) for row in values):
            raise self.refusal(file, "its values are not rows of numbers")
        return {name: record[name] for name in IMAGE_SET_RECORD}

    def read_picture(self, index: int) -> Image.Image:
        """The PNG of an image. Raises `ValueError` for one that is missing, broken or not RGB."""
        file = self.file(index, ".png")
        try:
            with Image.open(file, formats=["PNG"]) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self.refusal(file, str(error)) from None
        if image.mode != "RGB":
            raise self.refusal(file, f"its mode is {image.mode}, not RGB")
        return image.convert("RGB")

    def read_result(self, index: int, seed: int) -> NoiseResult:
        """The noise of an image. Raises `ValueError` for one that is missing, broken or of another seed."""
        file = self.file(index, ".safetensors")
        try:
            result = NoiseResult.load(file)
        except (OSError, ValueError) as error:
            raise self.refusal(file, str(error).rstrip(".")) from None
        if result.provenance.get("seeds") != [seed] or len(result.noise) != 1:
            raise self.refusal(file, f"it is not the noise of the one image with the seed {seed}")
        return result

    def refusal(self, file: Path, reason: str) -> ValueError:
        return ValueError(
            f"Expected a folder that `ImageSet.save` or `grow_set` wrote, but {file} cannot be used: {reason}. Take "
            "another folder, or grow the set again."
        )


def is_row(row: dict[str, Any]) -> bool:
    """Whether all that a row of a table names is numbers, or nothing."""
    return all(value is None or type(value) in (int, float) for value in row.values())


# pipelines/loop_decoder.py


FULL_DECODER = "full_decoder"


def as_loop_decoder(decoder: Any, pipe: Any, denoisers: Sequence[nn.Module]) -> Any:
    """What `decoder=` takes as a module on the pipeline's device, in the dtype of its denoiser; `None` stays.

    The pipeline's own call scales and shifts the latents as the configuration of the decoder says, which for a tiny
    autoencoder are those that the denoiser gives, unchanged.

    Args:
        decoder: A Hub id or a folder of an `AutoencoderTiny`, or a loaded module with `decode` and a `config`.
        pipe: The pipeline.
        denoisers: Its denoisers.

    Raises:
        ValueError: For a pipeline whose latents a tiny autoencoder does not know, and for a decoder that takes other
            latents, makes images of another size, or is elsewhere.
        TypeError: For what is no decoder.
    """
    if decoder is None:
        return None
    check_plain_latents(pipe)
    dtype = next(next(iter(denoisers), pipe.vae).parameters()).dtype
    device = torch.empty(0, device=pipe._execution_device).device  # with its index
    if isinstance(decoder, str | os.PathLike):
        found: Any = AutoencoderTiny.from_pretrained(os.fspath(decoder), torch_dtype=dtype)
        decoder = found.to(device).requires_grad_(False).eval()
    check_decoder(decoder, device, dtype)
    check_channels(decoder, pipe)
    check_scale(decoder, pipe, device, dtype)
    return decoder


def check_plain_latents(pipe: Any) -> None:
    """Raise `ValueError` unless latents are scaled and shifted by two numbers before they are decoded."""
    vae = getattr(pipe, "vae", None)
    normalised = isinstance(vae, AutoencoderKL) and any(
        vae.config.get(name) is not None for name in ("latents_mean", "latents_std")
    )
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny) or normalised:
        other = "one that normalises each channel of its latents" if normalised else type(vae).__name__
        raise ValueError(
            f"Expected a pipeline with an `AutoencoderKL` that scales its latents by one number, for which there are "
            f"tiny autoencoders, but {type(pipe).__name__} has {other}. Use `decoder=None`."
        )


def check_decoder(decoder: Any, device: torch.device, dtype: torch.dtype) -> None:
    if not (
        isinstance(decoder, nn.Module) and callable(getattr(decoder, "decode", None)) and hasattr(decoder, "config")
    ):
        raise TypeError(
            "Expected `decoder` to be a Hub id, a folder or a loaded `AutoencoderTiny`, with `decode` and `config`, "
            f"but got {type(decoder).__name__}."
        )
    weight = next(decoder.parameters(), None)
    if weight is not None and (weight.device, weight.dtype) != (device, dtype):
        raise ValueError(
            f"Expected the decoder in {dtype} on {device}, as the denoiser, but got {weight.dtype} on {weight.device}. "
            f'Call `decoder.to("{device}", {dtype})`.'
        )


def check_channels(decoder: Any, pipe: Any) -> None:
    expected, found = pipe.vae.config.latent_channels, decoder.config.get("latent_channels")
    if found != expected:
        raise ValueError(
            f"Expected a decoder of latents with {expected} channels, as those of {type(pipe).__name__}, but got one "
            f"of {found}. There are taesd, taesdxl, taesd3 and taef1 of `madebyollin` for SD, SDXL, SD3 and Flux."
        )


def check_scale(decoder: Any, pipe: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ValueError` unless images have the size that the pipeline's own have. Decodes a few zeros."""
    latents = torch.zeros(1, pipe.vae.config.latent_channels, 8, 8, device=device, dtype=dtype)
    with torch.no_grad():
        images = decoder.decode(latents, return_dict=False)[0]
    side = 8 * pipe.vae_scale_factor
    if images.shape != (1, 3, side, side):
        raise ValueError(
            f"Expected a decoder that makes {side} × {side} pixels of latents of 8 × 8, as that of "
            f"{type(pipe).__name__} does, but got images of shape {tuple(images.shape)}."
        )


def describe_decoder(decoder: Any) -> dict[str, Any] | None:
    """What the provenance says of a decoder."""
    if decoder is None:
        return None
    return {
        "class": type(decoder).__name__,
        "name": str(decoder.config.get("_name_or_path") or "") or None,
        "approximation": True,
        "scores": f"of its images; those of the pipeline's own decoder are in reports[{FULL_DECODER!r}]",
    }


# callbacks/progress.py


class ProgressBar(NoiseCallback):
    """One tick per evaluation, with the mean best loss. `pipe.set_progress_bar_config` applies."""

    bar = None

    def on_run_start(self, state: NoiseState) -> None:
        self.bar = state.pipeline.progress_bar(total=state.steps)
        self.bar.set_description("Optimising noise")

    def on_step_end(self, state: NoiseState) -> None:
        if self.bar is None:
            return
        if not self.bar.disable:  # reading the loss waits for the device: only for those who look
            self.bar.set_postfix(best_loss=f"{state.best_loss.mean():.4f}", refresh=False)  # pyright: ignore
        self.bar.update()

    def on_run_end(self, state: NoiseState) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


# pipelines/chunk_size.py


ChunkSetting = int | Literal["auto"] | None


class KeptTensor:
    """A tensor that a graph has saved; the count is told when the graph lets go of it."""

    def __init__(self, tensor: torch.Tensor, release: Callable[[], None]) -> None:
        self.tensor, self.release = tensor.detach(), release  # a result that knows its graph would keep it for ever

    def __del__(self) -> None:
        self.release()


class GraphTooLarge(Exception):
    """A graph that is being built holds more than it may."""


class SavedBytes:
    """The bytes that graphs made inside this context hold, each storage once, parameters left out.

    Args:
        limit: What they may hold; `None` for anything.

    Attributes:
        held: Now.
        peak: The most at any one time.

    Raises:
        GraphTooLarge: Out of the operation that would hold more than the limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.held = self.peak = 0
        self.holders: Counter[int] = Counter()

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def keep(self, tensor: torch.Tensor) -> KeptTensor:
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return KeptTensor(tensor, lambda: None)
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self.holders[place]:
            if self.limit is not None and self.held + size > self.limit:
                raise GraphTooLarge
            self.held += size
            self.peak = max(self.peak, self.held)
        self.holders[place] += 1
        return KeptTensor(tensor, lambda: self.release(place, size))

    def release(self, place: int, size: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.held -= size


def fitting_chunk_size(batch: int, per_image: int, free: int) -> int | None:
    """How many images to have in memory at once, `None` for the whole batch.

    Args:
        batch: B, how many there are.
        per_image: The bytes that the graph of one holds.
        free: The bytes that are free; half of them is left to what was not counted.
    """
    fitting = free // 2 // per_image if per_image else batch
    return None if fitting >= batch else max(1, fitting)


def check_chunk_size(chunk_size: Any) -> None:
    """Raise `ValueError` unless `chunk_size` is an integer of 1 or more, "auto" or `None`."""
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size >= 1
    if not whole and chunk_size is not None and chunk_size != "auto":
        raise ValueError(f'Expected `chunk_size` to be 1 or more, "auto" or `None`, but got {chunk_size!r}.')


def free_memory(device: torch.device) -> int:
    """The bytes that tensors on a device can still take; for CUDA what its caching allocator keeps unused as well."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil  # accelerate brings it; not needed but here

    return psutil.virtual_memory().available


# pipelines/undoing.py


@contextlib.contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` at the end, and once more if that is interrupted: Ctrl-C may come while something is put back."""
    try:
        yield
    finally:
        try:
            undo()
        except BaseException:
            undo()
            raise


# pipelines/lean_layers.py


LEAN_BYTES = 2**18  # smaller inputs are left to autograd: there is nothing to gain


class LeanConv2d(nn.Conv2d):
    """A convolution that keeps its weights and not its input, as long as they are frozen."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_frozen(self) or self.padding_mode != "zeros" or isinstance(self.padding, str) or not is_lean(input):
            return super().forward(input)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return FrozenConvolution.apply(input, self.weight, self.bias, settings)  # pyright: ignore[reportReturnType]


class FrozenConvolution(torch.autograd.Function):
    """`F.conv2d` with a gradient for its input alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = input.shape, settings
        return F.conv2d(suited(input, weight), weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        gradient = suited(gradient, weight)
        if has_channels_last(gradient) and (turned := turned_settings(weight, *ctx.settings)):
            found = F.conv2d(gradient, weight.flip(2, 3).transpose(0, 1), None, *turned)
        else:
            found = conv2d_input(ctx.shape, weight, gradient, *ctx.settings)
        return found, None, None, None


def turned_settings(weight: Tensor, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> tuple | None:
    """Of the convolution with the turned kernel that is the gradient of one of stride 1.

    With the channels last CPUs are faster at it than at the gradient of a convolution.
    """
    turned = tuple(dilation[i] * (weight.shape[2 + i] - 1) - padding[i] for i in range(2))
    return (stride, turned, dilation, groups) if stride == (1, 1) and groups == 1 and min(turned) >= 0 else None


class LeanUpsample2D(Upsample2D):
    """Doubles an image in size and convolves it, in one transposed convolution of the small image: 4/9 of the products.

    Pixels that repeat meet several weights of the kernel, whose sum they can be multiplied with. In half precision the
    sums would have to be rounded: it keeps to the stock way.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        fits = is_plain(self) and output_size is None and not args and not kwargs and is_lean(hidden_states)
        # the kernel takes longer to add up than it saves where it is larger than the image
        fits = fits and self.conv.weight.numel() <= 4 * hidden_states.numel()  # pyright: ignore
        if not fits or torch.finfo(hidden_states.dtype).bits < 32:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return FrozenUpsampling.apply(hidden_states, self.conv.weight, self.conv.bias)  # pyright: ignore


class FrozenUpsampling(torch.autograd.Function):
    """A 3 x 3 convolution of the nearest neighbour upsampling by 2, with a gradient for its input alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.conv_transpose2d(suited(input), doubling_kernel(weight), bias, stride=2, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors
        return F.conv2d(suited(gradient), doubling_kernel(weight), stride=2, padding=1), None, None


def doubling_kernel(weight: Tensor) -> Tensor:
    """A 3 x 3 kernel (O, I, 3, 3) to that of a transposed convolution (I, O, 4, 4) which also doubles the image.

    Doubling is a transposed convolution with four ones; this is the two after one another.
    """
    wide = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    wide = wide[..., 1:, :] + wide[..., :-1, :]
    return suited(wide[..., 1:] + wide[..., :-1])


class LeanGroupNorm(nn.GroupNorm):
    """A group normalization whose output knows what it was made of, for a `LeanSiLU` that comes next."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if is_lean(input) and output.requires_grad:
            settings = (self.num_groups, self.weight, self.bias, self.eps)
            vars(output)["normalized_from"] = output._version, input, settings
        return output


class LeanSiLU(nn.SiLU):
    """A SiLU that keeps the input of the group normalization before it, which is kept anyway, and not its own."""

    def forward(self, input: Tensor) -> Tensor:
        version, *source = vars(input).get("normalized_from", (None,))
        if not is_lean(input) or self.inplace or version != input._version:  # of something else, or written to since
            return super().forward(input)
        return NormalizedSiLU.apply(input, *source)  # pyright: ignore[reportReturnType]


class NormalizedSiLU(torch.autograd.Function):
    """`silu(normalized)`, where `normalized` is computed again from what was normalized in the backward pass."""

    @staticmethod
    def forward(ctx: Any, normalized: Tensor, before: Tensor, settings: tuple) -> Tensor:
        ctx.save_for_backward(before)
        ctx.settings = settings
        return F.silu(normalized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (before,) = ctx.saved_tensors
        groups, weight, bias, eps = ctx.settings
        normalized = F.group_norm(before, groups, weight, bias, eps)
        return torch.ops.aten.silu_backward(gradient, normalized), None, None


class LeanGEGLU(GEGLU):
    """A gated linear unit that keeps its projection, and not the gate that follows from it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or hidden_states.device.type == "npu" or not is_lean(hidden_states, dimensions=3):
            return super().forward(hidden_states, *args, **kwargs)
        return GatedProjection.apply(self.proj(hidden_states))  # pyright: ignore[reportReturnType]


class GatedProjection(torch.autograd.Function):
    """`values * gelu(gates)` of the two halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        values, gates = projected.chunk(2, dim=-1)
        return values * F.gelu(gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        (projected,) = ctx.saved_tensors
        values, gates = projected.chunk(2, dim=-1)
        of_gates = torch.ops.aten.gelu_backward(gradient * values, gates)
        return torch.cat([gradient * F.gelu(gates), of_gates], dim=-1)


def is_frozen(layer: nn.Conv2d) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters())


def is_plain(layer: Upsample2D) -> bool:
    """Whether a layer doubles by repeating pixels, and then does nothing but a frozen 3 x 3 convolution."""
    conv = layer.conv if layer.use_conv and layer.name == "conv" else None
    if type(conv) is not LeanConv2d or layer.norm is not None or not layer.interpolate or layer.use_conv_transpose:
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    hooked = conv._forward_hooks or conv._forward_pre_hooks or "forward" in vars(conv)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and is_frozen(conv) and not hooked


def suited(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """In the order in which a CPU convolves fastest with a weight; as they are on other devices.

    With the channels last, unless the weight is not much smaller: those of the middle of a U-Net are larger than its
    images. Where a kernel is of one pixel a change of the order takes as long as it saves.
    """
    if values.device.type != "cpu" or (weight is not None and weight[0, 0].numel() == 1):
        return values
    last = weight is None or values.numel() >= 4 * weight.numel()
    return values.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def has_channels_last(values: Tensor) -> bool:
    """Whether values on a CPU are in that order, and in no other at the same time."""
    last = values.is_contiguous(memory_format=torch.channels_last) and not values.is_contiguous()
    return last and values.device.type == "cpu"


def is_lean(input: Tensor, dimensions: int = 4) -> bool:
    """Whether a graph is being made of something large, in the precision of its own tensors."""
    graph = torch.is_grad_enabled() and input.requires_grad and input.ndim == dimensions
    return graph and input.numel() * input.element_size() >= LEAN_BYTES and not in_autocast(input.device.type)


def in_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


LEAN_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: LeanConv2d,
    nn.GroupNorm: LeanGroupNorm,
    nn.SiLU: LeanSiLU,
    Upsample2D: LeanUpsample2D,
    GEGLU: LeanGEGLU,
}


@contextlib.contextmanager
def lean_layers(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Layers of these modules are lean inside, and what they were outside; subclasses and compiled modules stay."""
    changed = [(layer, type(layer)) for root in roots for layer in plain_layers(root)]

    def put_back() -> None:
        for layer, kind in changed:
            layer.__class__ = kind

    with undoing(put_back):
        for layer, kind in changed:
            layer.__class__ = LEAN_LAYERS[kind]
        yield


def plain_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a module that have a lean form; a compiled module would be compiled again for them."""
    if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
        return
    if type(module) in LEAN_LAYERS:
        yield module
    for child in module.children():
        yield from plain_layers(child)


# pipelines/module_state.py


DENOISERS = ("unet", "transformer", "transformer_2")
CALLED_IN_STEPS = (*DENOISERS, "controlnet")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ENCODERS = ("text_encoder", "image_encoder", "safety_checker")


def modules_of(pipe) -> dict[str, nn.Module]:
    """The pipeline's components that are torch modules, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


@contextlib.contextmanager
def frozen_modules(pipe, decoder: nn.Module | None = None) -> Iterator[None]:
    """All modules, and a decoder that is used beside them, in `eval()`, without parameter gradients and with lean
    layers inside; exactly as before outside."""
    roots = [*modules_of(pipe).values(), *([] if decoder is None else [decoder])]
    modules = [module for root in roots for module in root.modules()]
    trained = [module for module in modules if module.training]
    # by name: offloading puts other parameters in the place of these
    learning = [(module, name) for module in modules for name in learning_parameters(module)]

    def switch(on: bool) -> None:
        for module in trained:
            module.training = on
        for module, name in learning:
            module.get_parameter(name).requires_grad_(on)

    with undoing(lambda: switch(True)):
        switch(False)
        with lean_layers(roots):
            yield


def learning_parameters(module: nn.Module) -> list[str]:
    """The names of a module's own parameters that take a gradient."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]


def refuse_unsuited(pipe, gradient: str | None) -> None:
    """Raise `ValueError`, with the remedy, for modules in a state that a method cannot work with.

    Args:
        pipe: The pipeline.
        gradient: What the method differentiates; see `PipelineSampler.images`. What no gradient passes may be offloaded
            and attend by any kernel.
    """
    for name, root in modules_of(pipe).items():
        refuse_cache(name, root)
        if passes(name, gradient):
            refuse_offload(name, root)
            refuse_attention(name, root)
            refuse_casting(name, root)


def passes(name: str, gradient: str | None) -> bool:
    """Whether a gradient passes a component of a pipeline: prompts are encoded without one."""
    if gradient is None or name.startswith(ENCODERS):
        return False
    return gradient == "full" or name not in DENOISERS


def refuse_offload(name: str, root: nn.Module) -> None:
    """Raise `ValueError` if a module is offloaded: weights that move between forward and backward break gradients."""
    expected = (
        f"Expected `{name}` to stay on its device, but it is offloaded, and weights that move between the forward and "
        "the backward pass break the gradient. Use a method without gradients, such as `BestOfN`, or "
    )
    for module in root.modules():
        if group_offloaded(module):
            raise ValueError(f"{expected}load the pipeline again without group offloading.")
        if offloads(getattr(module, "_hf_hook", None)):
            raise ValueError(f"{expected}call `pipe.remove_all_hooks()` and `pipe.to(device)` first.")


def is_offloaded(root: nn.Module) -> bool:
    """Whether the weights of a module, or of a part of it, move between devices."""
    return any(group_offloaded(module) or offloads(getattr(module, "_hf_hook", None)) for module in root.modules())


def offloads(hook) -> bool:
    """Whether an accelerate hook moves weights: `CpuOffload`, or `AlignDevicesHook(offload=True)`, alone or nested."""
    nested = getattr(hook, "hooks", ())
    return type(hook).__name__ == "CpuOffload" or bool(getattr(hook, "offload", False)) or any(map(offloads, nested))


def group_offloaded(module: nn.Module) -> bool:
    return any("group_offloading" in name for name in diffusers_hooks(module))


def diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    """The hooks that diffusers put on a module, by name."""
    return getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def refuse_attention(name: str, root: nn.Module) -> None:
    """Raise `ValueError` if a module attends by a kernel without a backward pass, some of which drop the gradient."""
    for module in root.modules():
        backend = attention_backend_of(module)
        if backend is not None and ("sage" in backend or backend == "_flash_3"):
            raise ValueError(
                f'Expected an attention backend with a backward pass, but `{name}` uses "{backend}", which has none. '
                f'Call `pipe.{name}.set_attention_backend("native")` first, outside any `attention_backend` context, '
                "or use a method without gradients, such as `BestOfN`."
            )


def attention_backend_of(module: nn.Module) -> str | None:
    """The kernel that an attention module calls: its own or the one in force; `None` for one that chooses none."""
    processor = getattr(module, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return None
    own = getattr(processor, "_attention_backend", None)
    return AttentionBackendName(own or _AttentionBackendRegistry.get_active_backend()[0]).value


def refuse_casting(name: str, root: nn.Module) -> None:
    """Raise `ValueError` for convolutions stored in another type: their backward pass finds the stored weights.

    Linear layers keep those that they computed with.
    """
    for module in root.modules():
        if isinstance(module, CONVOLUTIONS) and "layerwise_casting" in diffusers_hooks(module):
            raise ValueError(
                f"Expected convolutions that are stored as they compute, but those of `{name}` are cast layer by "
                "layer, which breaks the gradient. Load the pipeline again and leave them out: "
                f"`pipe.{name}.enable_layerwise_casting(..., skip_modules_classes=(torch.nn.Conv2d,))`."
            )


def refuse_cache(name: str, root: nn.Module) -> None:
    """Raise `ValueError` if a module reuses what earlier denoising steps computed.

    Some caches ask the pipeline which timestep it is at, and the evaluations run on a copy of it; all hold the graph of
    a step for the next, and a run that is interrupted would leave its state behind.
    """
    for module in root.modules():
        kept = [hook for hook in diffusers_hooks(module).values() if getattr(hook, "_is_stateful", False)]
        if kept:
            raise ValueError(
                f"Expected modules without a cache across denoising steps, but `{name}` has one "
                f"({type(kept[0]).__name__}). Call `pipe.{name}.disable_cache()` first; the final image may be drawn "
                "with the cache again."
            )


def without_gradient(module: nn.Module) -> nn.Module:
    """A shallow copy that shares all weights and whose forward pass leaves no graph."""
    return with_forward(module, torch.no_grad()(module.forward))


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A shallow copy that shares all weights and has another forward pass."""
    twin = copy.copy(module)
    vars(twin)["forward"] = forward
    return twin


def converted_apart(module: nn.Module) -> nn.Module:
    """A shallow copy that shares all weights, until it is converted to another dtype: then it has a copy of them.

    A half-precision pipeline whose VAE has `force_upcast` converts the shared VAE to decode, and back, which swaps the
    weights under the graph. This one is converted as well, and leaves the shared one alone.
    """
    twin = copy.copy(module)
    vars(twin).pop("decode", None)  # a compiled one is bound to the shared weights
    contents: dict[torch.dtype, dict[str, Any]] = {module.dtype: vars(module)}  # pyright: ignore

    def to(dtype: torch.dtype) -> nn.Module:
        if dtype not in contents:
            contents[dtype] = vars(copy.deepcopy(module).to(dtype))
        for kind in ("_modules", "_parameters", "_buffers"):
            vars(twin)[kind] = contents[dtype][kind]
        return twin

    vars(twin)["to"] = to
    return twin


# pipelines/checkpointing.py


CheckpointPolicy = Literal["none", "blocks", "steps"]
Checkpointing = Literal["auto", "none", "blocks", "steps"]
POLICIES: tuple[CheckpointPolicy, ...] = ("none", "blocks", "steps")  # each holds less than the one before
BLOCK_SETTINGS = ("gradient_checkpointing", "_gradient_checkpointing_func")
BLOCK_CHECKPOINT = functools.partial(checkpoint, use_reentrant=False)


class Checkpoints:
    """The checkpointing of one pipeline call, in force inside `with`; shared by the samplers of its parts.

    "blocks" is diffusers' own: of each block of denoiser and decoder only the input is kept. "steps" keeps the input of
    each call of the denoiser alone, and of the call that is computed again the blocks' inputs, so that the memory
    hardly grows with the number of steps. A denoiser without such blocks, and one whose LoRA is scaled by the call, is
    kept by its calls with "blocks" too: diffusers scales it around its forward pass, and a block that was computed
    again later would miss that.

    A call that was begun inside has to be passed backwards inside, as blocks look at their setting then too. Outside
    the modules are exactly as they were; what has been turned on by the user stays on throughout.

    Args:
        setting: A policy, or "auto": the first of none, blocks and steps whose graph takes at most half of the memory
            that is free. It is counted while the first graph is built, which is begun again with the next policy where
            it does not fit.
        denoisers: What is called in each step with a gradient.
        decoder: What is called once.
        scaled_lora: Whether the call scales the LoRA of its denoiser.

    Attributes:
        policy: What is in force.
    """

    policy: CheckpointPolicy = "none"

    def __init__(
        self,
        setting: Checkpointing,
        denoisers: Sequence[nn.Module] = (),
        decoder: Any = None,
        scaled_lora: bool = False,
    ) -> None:
        self.setting: Checkpointing = setting
        self.denoisers, self.scaled_lora = list(denoisers), scaled_lora
        self.decoder = decoder
        self.in_force = self.settled = False
        self.counted: set[Hashable] = set()
        self.changed: list[tuple[nn.Module, dict[str, Any]]] = []

    def __enter__(self) -> "Checkpoints":
        self.in_force = True
        self.take("none" if self.setting == "auto" else self.setting)
        return self

    def __exit__(self, *error: Any) -> None:
        with undoing(self.restore):
            pass

    def restore(self) -> None:
        for module, before in self.changed:
            for name in BLOCK_SETTINGS:
                vars(module).pop(name, None)
            vars(module).update(before)
        self.changed = []
        self.policy, self.in_force, self.settled = "none", False, False
        self.counted.clear()

    @property
    def ladder(self) -> Sequence[CheckpointPolicy]:
        """The policies that may be taken from here on: one, unless the setting is "auto"."""
        if self.setting != "auto" or not self.in_force:
            return (self.policy,)
        within = POLICIES if self.denoisers else POLICIES[:2]  # without them there is a decoder only
        return within[within.index(self.policy) :]

    def take(self, policy: CheckpointPolicy) -> None:
        """Put a policy in force for the graphs from here on; those that exist stay as they are."""
        self.policy = policy
        if policy != "none" and not self.changed:
            kept_by_blocks = [part for part in [*self.denoisers, self.decoder] if self.has_blocks(part)]
            modules = [module for part in kept_by_blocks for module in blocks_of(part)]
            self.changed = [(module, own_block_settings(module)) for module in modules]
            for module in modules:
                vars(module).update(zip(BLOCK_SETTINGS, (True, BLOCK_CHECKPOINT), strict=True))

    def has_blocks(self, part: Any) -> bool:
        """Whether a module is kept by its blocks."""
        scaled = self.scaled_lora and part is not self.decoder
        return bool(getattr(part, "_supports_gradient_checkpointing", False)) and not scaled

    def call_of(self, part: Any) -> Any:
        """A denoiser as it is to be called in a step."""
        whole = self.policy == "steps" or (self.policy == "blocks" and not self.has_blocks(part))
        return recomputed_whole(part) if whole and part in self.denoisers else part

    def settle(self) -> None:
        """Leave it at the policy that is in force, or that is taken by hand."""
        self.settled = True

    def fitted(self, kind: Hashable, device: torch.device, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`draw()`, which builds a graph, with the first policy of those that may be taken whose graph fits.

        Graphs are counted once of each `kind`: the images of a run are all made in the same way.
        """
        if self.settled or kind in self.counted:
            return draw()
        self.counted.add(kind)
        *others, last = self.ladder
        for policy in others:
            self.take(policy)
            try:
                with SavedBytes(limit=free_memory(device) // 2):
                    return draw()
            except GraphTooLarge:
                continue
        self.take(last)
        return draw()


def blocks_of(part: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model that keep their inputs alone once they are told to, and are not yet."""
    for module in part.modules():
        if getattr(module, "gradient_checkpointing", True) is False:
            yield module


def own_block_settings(module: nn.Module) -> dict[str, Any]:
    """What a module has of its own to say about keeping its inputs alone."""
    return {name: vars(module)[name] for name in BLOCK_SETTINGS if name in vars(module)}


def recomputed_whole(module: nn.Module) -> nn.Module:
    """A shallow copy that shares all weights and keeps of each call its inputs alone, where there is a gradient."""
    forward = module.forward

    @functools.wraps(forward)
    def keep_inputs(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return with_forward(module, keep_inputs)


def check_checkpointing(checkpointing: Any) -> None:
    """Raise `ValueError` unless `checkpointing` is "auto" or a policy."""
    if checkpointing not in ("auto", *POLICIES):
        raise ValueError(
            f'Expected `checkpointing` to be "auto", "none", "blocks" or "steps", but got {checkpointing!r}.'
        )


def scales_lora(request: dict[str, Any]) -> bool:
    """Whether a call scales the LoRA of its denoiser, as by `cross_attention_kwargs={"scale": 0.5}`."""
    settings = [value for value in request.values() if isinstance(value, dict)]
    return any(value.get("scale") not in (None, 1, 1.0) for value in settings)


# pipelines/frequency_bands.py


BANDS = ("lowest third", "middle third", "highest third")


def band_energies(change: torch.Tensor) -> torch.Tensor:
    """`change` (B, ..., H, W) to how much of its squared norm lies in each third of the frequencies, `(B, 3)`.

    With the orthonormal FFT of each channel the three add up to `‖change‖²` (Parseval). See `frequency_bands`.
    """
    power = torch.fft.fft2(change, norm="ortho").abs().square().flatten(1, -3).sum(1)
    return (power[:, None] * frequency_bands(*change.shape[-2:]).to(power)).sum((-2, -1))


@functools.cache
def frequency_bands(height: int, width: int) -> torch.Tensor:
    """Which third each entry of `fft2` belongs to, `(3, H, W)` zeros and ones: lowest, middle, highest.

    The thirds are of the radial frequency √(u² + v²) in cycles per entry, from 0 to the largest that the grid has, in
    its corner. "It's Never Too Late", https://arxiv.org/abs/2601.00090, figure 6, speaks of thirds of the spectrum and
    does not say where it ends. The lowest third of the radius holds only about 17% of the entries of large grids, the
    middle 52% and the highest 30%: white noise has its energy in these shares.
    """
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    radius = torch.hypot(rows[:, None], columns)
    third = (3 * radius / radius.max().clamp_min(1e-12)).long().clamp(max=2)
    return torch.stack([third == band for band in range(3)])


# pipelines/noise_file.py


SECONDS_BETWEEN_WRITES = 10.0


class NoiseFile:
    """The file that holds the best noise so far: from the first step on, whatever ends the run, always whole.

    Args:
        path: Where the file is to be; its folder is made. What is there already is replaced.

    Raises:
        ValueError: If no file can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ValueError(f"Expected `save_noise_to` to be the path of a file, but got {path!r}.")
        self.path = Path(path)
        self.next_write = -math.inf
        if os.path.isdir(self.path):
            raise ValueError(f"Expected `save_noise_to` to be a file, but {path} is a folder. Add a name to it.")
        part = part_of_file(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_and_remove(part)
        except (OSError, ValueError) as error:
            raise ValueError(f"Expected `save_noise_to` to be a file that can be written, but got {error}.") from None

    def keep(self, result: Callable[[], NoiseResult]) -> None:
        """Write what a run has found after a step, unless that was done a moment ago."""
        if time.monotonic() >= self.next_write:
            self.write_if_possible(result())
            self.next_write = time.monotonic() + SECONDS_BETWEEN_WRITES

    def write_if_possible(self, result: NoiseResult) -> None:
        """Write a result, and warn where that fails: a run does not end because the disk is full."""
        try:
            result.save(self.path)
        except Exception as error:
            warnings.warn(f"The noise found so far cannot be written to {self.path}: {error}", stacklevel=2)


def write_and_remove(file: Path) -> None:
    """Raise `OSError` where no file can be written."""
    try:
        file.touch()
    finally:
        file.unlink(missing_ok=True)


# pipelines/latent_space.py


def drawing_function(cls: type) -> Callable[..., types.FunctionType]:
    """`draw -> prepare_latents`: the stock function of `cls` with `draw` in the place of its `randn_tensor`.

    A copy of the function with that one global replaced hands our noise to the stock scaling and packing: no global
    patch, and differentiable. Raises `TypeError` if the class does not draw that way.
    """
    stock = next((vars(base) for base in cls.__mro__ if defines_latents(base)), {})
    function = inspect.unwrap(stock.get("prepare_latents", lambda: None))
    if "randn_tensor" in function.__code__.co_names:
        return lambda draw: with_globals(function, randn_tensor=draw)
    raise TypeError(
        "Expected a text-to-image pipeline whose `prepare_latents` draws its noise with diffusers' `randn_tensor`, but "
        f"that of {cls.__name__} does not. Draw the noise by `randn_tensor` there, and call no `super()`."
    )


def defines_latents(cls: type) -> bool:
    """Whether a class has a `prepare_latents` of its own that is not our hook."""
    return "prepare_latents" in vars(cls) and not hasattr(cls, "_noise_run")


def with_globals(function: types.FunctionType, **replaced: Any) -> types.FunctionType:
    """A copy of a function that sees other values under some of its global names."""
    names = {**function.__globals__, **replaced}
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def drawing_with(noise_sampler: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor]:
    """What stands in for `randn_tensor`: that function itself, or a noise sampler with its shape checked."""
    if noise_sampler is None:
        return randn_tensor

    def draw(shape, generator=None, device=None, dtype=None, layout=None) -> torch.Tensor:
        noise = noise_sampler(tuple(shape), generator=generator, device=device, dtype=dtype)
        if noise.shape != torch.Size(shape):
            raise ValueError(
                f"Expected the noise sampler to return noise of shape {tuple(shape)}, but got {tuple(noise.shape)}. "
                "Draw the shape that it is called with."
            )
        return noise.to(device=device, dtype=dtype)

    return draw


def first_of(prepared):
    """What `prepare_latents` returns is the latents, or a tuple that begins with them."""
    return prepared[0] if isinstance(prepared, tuple) else prepared


class LatentSpace:
    """Between unit, spatial noise and the latents of one call of `pipe.prepare_latents(*args, **kwargs)`.

    * noise: `(B, C, H, W)`, what the pipeline draws, before scaling and packing (`(B, 1, C, H, W)` for Qwen-Image).
    * prepared: what `prepare_latents` returns: scaled by `init_noise_sigma`, packed into tokens where the family packs,
      mixed with the encoded image where it begins with one.
    * latents: what the pipeline accepts as `latents=`: packed, not scaled; what is prepared, where it begins with an
      image.

    No family is named here: the stock function does the packing, and is asked which form it takes back.

    Functions that draw more than the noise, as from the posterior of an encoded image, need a generator in the state
    that they first had: give it as `generator=...` wherever `overrides` are taken.

    Args:
        pipe, args, kwargs: The call.
        noise_sampler: Draws the noise of the call in the place of diffusers' `randn_tensor`, which `None` leaves there.
    """

    def __init__(
        self, pipe, args: tuple, kwargs: dict[str, Any], noise_sampler: Callable[..., torch.Tensor] | None = None
    ) -> None:
        self.with_draw = drawing_function(type(pipe))
        self.noise_sampler, self.draw_noise = noise_sampler, drawing_with(noise_sampler)
        signature = inspect.signature(self.with_draw(randn_tensor))
        arguments = dict(signature.bind(pipe, *args, **kwargs).arguments)
        self.takes_latents = "latents" in signature.parameters
        self.given = arguments.pop("latents", None)
        extra = arguments.pop("kwargs", {})
        self.arguments = {name: value for name, value in {**arguments, **extra}.items() if name != "self"}
        self.known_packing: Packing | None = None

    def for_images(self, count: int) -> "LatentSpace":
        """The same space for so many images.

        Raises:
            ValueError: The family is not told how many there are, or begins with an image for each.
        """
        if "batch_size" not in self.arguments or "image" in self.arguments:
            raise ValueError(
                "Expected a `prepare_latents` with the argument `batch_size` and without an image, to draw some images "
                f"by themselves, but got one with {list(self.arguments)}. Use `chunk_size=None`."
            )
        space = copy.copy(self)
        space.known_packing = None
        # generators are given with each call: one for each image would not fit the new number
        unset = {"generator": None} if "generator" in self.arguments else {}
        space.arguments = {**self.arguments, "batch_size": count, **unset}
        return space

    def on(self, pipe, draw: Callable[..., torch.Tensor], latents: torch.Tensor | None = None, **overrides):
        """Run the stock function on `pipe` with `draw(shape, **kwargs)` for its random numbers."""
        given = {"latents": latents} if self.takes_latents else {}
        return self.with_draw(draw)(pipe, **{**self.arguments, **given, **overrides})

    def draw(self, pipe) -> tuple[torch.Tensor, bool]:
        """The base noise of the call, and whether it was drawn (rather than given as `latents=`)."""
        drawn: list[torch.Tensor] = []

        def record(*args, **kwargs):
            drawn.append(self.draw_noise(*args, **kwargs))
            return drawn[-1]

        prepared = first_of(self.on(pipe, record, self.given))
        if drawn:
            return drawn[0], True
        if self.given is None:
            raise ValueError(
                f"Expected a call that draws its noise, but this one of {type(pipe).__name__} draws none, and there is "
                "nothing to optimise. Leave out the argument that lets it begin without, such as `denoising_start`."
            )
        noise = self.to_noise(pipe, self.given)
        again = first_of(self.prepare(pipe, noise))
        comparable = again.shape == prepared.shape  # families that pack hand spatial noise on as it is
        if comparable and not torch.allclose(again.float(), prepared.float(), rtol=0.05, atol=0.05):
            raise latents_with_image(pipe)  # the tolerance is that of half precision
        return noise, False

    def prepare(self, pipe, noise: torch.Tensor, draw: bool = False, **overrides):
        """Noise to what `prepare_latents` returns, differentiable; with `draw` what it draws is drawn and discarded."""

        def put(*args, **kwargs) -> torch.Tensor:
            if draw:
                self.draw_noise(*args, **kwargs)
            return noise.to(kwargs.get("dtype") or noise.dtype)

        return self.on(pipe, put, **overrides)

    def to_latents(self, pipe, noise: torch.Tensor, **overrides) -> torch.Tensor:
        """Noise to what the pipeline takes as `latents=`, in the pipeline's dtype."""
        prepared = first_of(self.prepare(pipe, noise, **overrides))
        if not self.takes_latents:  # then the pipeline goes on with `latents` as they are
            return prepared
        for candidate in (noise.to(prepared.dtype), prepared):
            if self.accepts(pipe, candidate, prepared):
                return candidate
        raise TypeError(f"{type(pipe).__name__} takes neither its own noise nor its own latents as `latents=`.")

    def to_noise(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """What a user passed as `latents=` to noise. Raises `ValueError` if the shape fits neither form."""
        shape, packed = self.packing(pipe).noise, self.packing(pipe).packed
        if latents.shape not in (shape, packed):
            raise ValueError(
                f"Expected `latents` of shape {tuple(shape)} or {tuple(packed)}, but got {tuple(latents.shape)}."
            )
        return self.unpack(pipe, latents)

    def unpack(self, pipe, latents: torch.Tensor) -> torch.Tensor:
        """Latents in the layout of the denoiser to the spatial layout of the noise, differentiable."""
        packing = self.packing(pipe)
        if latents.shape == packing.noise:
            return latents
        return latents.flatten(1).gather(1, packing.places.to(latents.device)).view(packing.noise)

    def packing(self, pipe) -> "Packing":
        """How the family packs."""
        if self.known_packing is None:
            leaves: list[torch.Tensor] = []

            def draw(shape, *_, device=None, dtype=None, **__) -> torch.Tensor:
                leaves.append(torch.zeros(shape, device=device, dtype=dtype, requires_grad=True))
                return leaves[-1]

            any_generator: Any = torch.Generator().manual_seed(0)  # not the one of the call, which would go on
            with torch.enable_grad():
                prepared = first_of(self.on(pipe, draw, generator=any_generator))
            self.known_packing = Packing(leaves[0].shape, prepared.shape, places_in(prepared, leaves[0]))
        return self.known_packing

    def accepts(self, pipe, latents: torch.Tensor, prepared: torch.Tensor) -> bool:
        try:
            returned = first_of(self.on(pipe, randn_tensor, latents))
        except ValueError:  # the family checks the shape of given latents
            return False
        return returned.shape == prepared.shape and torch.equal(returned, prepared)


class Packing(NamedTuple):
    """The shape of the noise and of what is prepared, and `(B, C·H·W)` where each entry of the noise is put there."""

    noise: torch.Size
    packed: torch.Size
    places: torch.Tensor


def places_in(prepared: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """For each entry of the noise its place among those that are `prepared` from it, each image by itself.

    Preparing permutes, scales by one number and adds, so the gradient leads back from each place to its entry. Numbers
    go that way digit by digit, since half precision has no large ones.
    """

    def lead_back(values: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(prepared, noise, values.to(prepared), retain_graph=True)[0].flatten(1).double()

    scale = lead_back(torch.ones_like(prepared))
    numbers = torch.arange(prepared[0].numel()).view(prepared.shape[1:]).expand(prepared.shape)
    places, unit = torch.zeros_like(scale, dtype=torch.long), 1
    while unit < prepared[0].numel():
        places += unit * (lead_back(numbers // unit % 64) / scale).round().long()
        unit *= 64
    return places


def latents_with_image(pipe) -> ValueError:
    """The error about `latents` that are not the noise alone."""
    return ValueError(
        f"Expected no `latents`, as {type(pipe).__name__} takes there what its image and the noise make together, and "
        "only the noise is optimised. Leave them out, and choose the noise by `generator` or `noise_sampler`."
    )


# schedulers/x0_prediction.py


AffineCoefficients = tuple[torch.Tensor, torch.Tensor]


def predict_x0(
    scheduler: Any, model_output: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor
) -> torch.Tensor:
    """The x0 estimate of one model call, differentiable in `sample` and in `model_output`.

    It is affine in both, x0 = skip·sample + out·model_output, and the two coefficients follow from the noise level
    x = a·x0 + b·ε of the call and from what the model predicts. The level is, with σ and ᾱ from the scheduler's tables,

    * variance preserving (DDIM, DDPM, LCM, TCD, PNDM, UnCLIP, Würstchen): a = √ᾱ, b = √(1−ᾱ), by timestep;
    * sigma space (Euler, Heun, KDPM2, LMS, DPMSolverSDE): a = 1, b = σ;
    * multistep solvers (DPMSolver, UniPC, DEIS, SASolver): a = 1/√(1+σ²), b = σ·a, or a = 1−σ, b = σ with flow sigmas;
    * flow matching: a = 1−σ, b = σ; TrigFlow (SCM): a = cos t, b = sin t; IPNDM: its own tables;
    * EDM and consistency models precondition: their scheduler's c_skip and c_out are the coefficients.

    See Karras et al. (https://arxiv.org/abs/2206.00364), table 1, for the preconditioning, Salimans & Ho
    (https://arxiv.org/abs/2202.00512), appendix D, for v-prediction, Lu & Song (https://arxiv.org/abs/2410.11081),
    section 3, for TrigFlow.

    The value is the one that the scheduler itself goes on with: where its `step` clips x0 (`clip_sample`) or thresholds
    it (`thresholding`), so does this function. The gradient is that of the unclipped estimate (straight-through), since
    a hard clip has no gradient exactly where x0 is too large and has to come back. What LCM reports as `denoised` is
    this x0 after its boundary scaling, which gives the sample a weight below 1e-5 from timestep 16 on; what TCD reports
    is noised again. With `s_churn > 0` Euler perturbs the sample inside `step`, which nothing here knows.

    The only thing that changes in the scheduler is its step index: where it is unset, the scheduler sets it itself,
    as its first `step` would, from `begin_index` or from `timestep`.

    Args:
        scheduler: The scheduler in use, after `set_timesteps`. A subclass of a known one counts as that one.
        model_output: `(B, C, ...)`, already guided, as handed to `scheduler.step`; with a learned variance
            `(B, 2C, ...)`, of which the first C channels are the prediction.
        timestep: The timestep of this call: a number, a tensor with one or with `(B,)` entries.
        sample: `(B, C, ...)`, the noisy latents of this call, as handed to `scheduler.step`: not yet scaled by
            `scale_model_input`.

    Returns:
        `(B, C, ...)`, the estimate of the clean latents in float32, or in float64 if `sample` is.

    Raises:
        TypeError: The scheduler has no x0 estimate or is unknown.
        ValueError: The scheduler's `prediction_type` does not go with its noise level, there is no signal to predict x0
            from (ε-prediction at zero terminal SNR), or `model_output` has not the shape of `sample`.
    """
    space = space_of(scheduler)
    dtype = torch.promote_types(sample.dtype, torch.float32)
    sample, output = sample.to(dtype), prediction_channels(scheduler, model_output, sample).to(dtype)
    skip, out = (spread_over_images(coefficient, sample) for coefficient in space.coefficients(scheduler, timestep))
    x0 = skip * sample + out * output
    if space.bound is None:
        return x0
    return space.bound(scheduler, x0.detach()) + (x0 - x0.detach())  # adds exactly 0


def prediction_channels(scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """`model_output` without the channels of a learned variance: it has the shape of `sample` then."""
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    if learned and model_output.shape[1] == 2 * sample.shape[1]:
        model_output = model_output[:, : sample.shape[1]]
    if model_output.shape != sample.shape:
        raise ValueError(
            f"Expected a model output of the shape {tuple(sample.shape)} of the sample, but got "
            f"{tuple(model_output.shape)}. If the rest is a learned variance, pass the prediction only, or use "
            f'`{type(scheduler).__name__}.from_config(scheduler.config, variance_type="learned_range")`.'
        )
    return model_output


def spread_over_images(coefficient: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """`coefficient`, one number or `(B,)`, in a shape, dtype and device that multiplies `sample` image by image."""
    return coefficient.to(sample).reshape(-1, *[1] * (sample.ndim - 1))


def exact(entry: torch.Tensor | float) -> torch.Tensor:
    """An entry of a scheduler's table in float64, which not every device has."""
    return torch.as_tensor(entry).detach().cpu().double()


def index_of_call(scheduler: Any, timestep: torch.Tensor | float) -> int:
    """Where the scheduler is in its list of sigmas; at the first call it finds out by itself."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return scheduler._step_index


def affine_in_prediction(
    scheduler: Any, prediction: str, signal: torch.Tensor, noise: torch.Tensor, flow: bool = False
) -> AffineCoefficients:
    """(skip, out) of x0 = skip·sample + out·model_output for a model that predicts `prediction`.

    v is defined on the circle, so a level off it is first scaled back to it: with r² = signal² + noise²,
    x/r = cos φ·x0 + sin φ·ε and v = cos φ·ε − sin φ·x0. A flow velocity is ε − x0, on the line signal + noise = 1.
    """
    if prediction == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "epsilon":
        require_signal(scheduler, signal)
        return 1 / signal, -noise / signal
    if prediction == "flow_prediction" and flow:
        return torch.ones_like(noise), -noise
    if prediction == "v_prediction" and not flow:
        squared = signal**2 + noise**2
        return signal / squared, -noise / squared.sqrt()
    raise unknown_prediction(scheduler, ("epsilon", "sample", "flow_prediction" if flow else "v_prediction"))


def require_signal(scheduler: Any, signal: torch.Tensor) -> None:
    """ε says nothing about x0 where the sample is nothing but ε."""
    if (signal == 0).any():
        raise ValueError(
            f'Expected some signal in the sample of {type(scheduler).__name__} with `prediction_type="epsilon"`, but '
            'got a timestep with zero SNR. Pass `rescale_betas_zero_snr=False`, `timestep_spacing="leading"`, or use a '
            "model with v-prediction."
        )


def unknown_prediction(scheduler: Any, known: tuple[str, ...]) -> ValueError:
    """The error about a `prediction_type` that the space of `scheduler` gives no meaning."""
    name = type(scheduler).__name__
    return ValueError(
        f"Expected `prediction_type` of {name} to be one of {', '.join(known)}, but got "
        f"{scheduler.config.get('prediction_type')!r}. Pass what the model was trained with: "
        f"`{name}.from_config(scheduler.config, prediction_type=...)`; where the scheduler has `use_flow_sigmas`, "
        "flow_prediction goes with True and v_prediction with False."
    )


def configured_prediction(scheduler: Any) -> str:
    """What the config says that the model predicts; Euler also knows an older name of "sample"."""
    prediction = scheduler.config.get("prediction_type", "epsilon")
    return "sample" if prediction == "original_sample" else prediction


def from_alphas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Variance preserving: ᾱ is looked up by timestep."""
    steps = torch.as_tensor(timestep).to(scheduler.alphas_cumprod.device, torch.long)
    alpha_bar = exact(scheduler.alphas_cumprod[steps])
    return affine_in_prediction(scheduler, configured_prediction(scheduler), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def from_cosine_time(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Würstchen and Stable Cascade: the timestep is a ratio in [0, 1] and ᾱ a function of it; they predict ε."""
    time = torch.as_tensor(timestep)
    alpha_bar = exact(scheduler._alpha_cumprod(time, time.device))
    return affine_in_prediction(scheduler, "epsilon", alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def from_sigma(scheduler: Any, sigma: torch.Tensor) -> AffineCoefficients:
    """Variance exploding: x = x0 + σ·ε."""
    sigma = exact(sigma)
    return affine_in_prediction(scheduler, configured_prediction(scheduler), torch.ones_like(sigma), sigma)


def from_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """The sigma of the step; a second-order scheduler that evaluates at the end of a step lists that sigma twice."""
    return from_sigma(scheduler, scheduler.sigmas[index_of_call(scheduler, timestep)])


def from_interpolated_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """KDPM2: every second call is at a sigma between two steps."""
    index = index_of_call(scheduler, timestep)
    table = scheduler.sigmas if scheduler.state_in_first_order else scheduler.sigmas_interpol
    return from_sigma(scheduler, table[index])


def from_ancestral_interpolated_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Ancestral KDPM2 keeps the sigma between two steps at the index of the first of them."""
    index = index_of_call(scheduler, timestep)
    first_order = scheduler.state_in_first_order
    return from_sigma(scheduler, scheduler.sigmas[index] if first_order else scheduler.sigmas_interpol[index - 1])


def from_midpoint_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """DPMSolverSDE remembers the sigma between two steps that it evaluates at."""
    sigma = scheduler.sigmas[index_of_call(scheduler, timestep)]
    return from_sigma(scheduler, sigma if scheduler.state_in_first_order else scheduler.mid_point_sigma)


def from_solver_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Multistep solvers, whether they go on with x0 or with ε: sigma is b/a, or b with flow sigmas."""
    sigma = exact(scheduler.sigmas[index_of_call(scheduler, timestep)])
    flow = bool(scheduler.config.get("use_flow_sigmas"))
    signal = 1 - sigma if flow else (1 + sigma**2).rsqrt()
    noise = sigma if flow else sigma * signal
    return affine_in_prediction(scheduler, configured_prediction(scheduler), signal, noise, flow)


def from_flow_sigmas(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Flow matching, x0 = x − σ·v; with `invert_sigmas` sigma counts the signal and the velocity points to it."""
    sigma = exact(scheduler.sigmas[index_of_call(scheduler, timestep)])
    return torch.ones_like(sigma), 1 - sigma if scheduler.config.get("invert_sigmas") else -sigma


def from_angle(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """TrigFlow (Sana-Sprint): the timestep is the angle, the output a velocity on the circle of radius `sigma_data`."""
    if scheduler.config.get("prediction_type") != "trigflow":
        raise unknown_prediction(scheduler, ("trigflow",))
    angle = exact(scheduler.timesteps[index_of_call(scheduler, timestep)])
    return angle.cos(), -angle.sin()


def from_own_tables(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """IPNDM: `alphas` is the signal and `betas` the noise, and its models predict v."""
    index = index_of_call(scheduler, timestep)
    return exact(scheduler.alphas[index]), -exact(scheduler.betas[index])


def from_edm(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """EDM: `prediction_type` is no more than the sign of the preconditioned output."""
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    if configured_prediction(scheduler) not in signs:
        raise unknown_prediction(scheduler, tuple(signs))
    sigma = exact(scheduler.sigmas[index_of_call(scheduler, timestep)])
    data = scheduler.config["sigma_data"]
    total = sigma**2 + data**2
    return data**2 / total, signs[configured_prediction(scheduler)] * sigma * data / total.sqrt()


def from_consistency(scheduler: Any, timestep: torch.Tensor | float) -> AffineCoefficients:
    """Consistency models: as EDM, with the identity as boundary condition at the smallest sigma."""
    sigma = exact(scheduler.sigmas[index_of_call(scheduler, timestep)])
    return scheduler.get_scalings_for_boundary_condition(sigma)


def clipped(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """`clip_sample`: to a fixed range."""
    limit = scheduler.config.get("clip_sample_range", 1.0)
    return x0.clamp(-limit, limit) if scheduler.config.get("clip_sample") else x0


def thresholded(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """`thresholding`: to a percentile of each image (https://arxiv.org/abs/2205.11487, section 2.3)."""
    return scheduler._threshold_sample(x0) if scheduler.config.get("thresholding") else x0


def thresholded_or_clipped(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """Thresholding takes the place of clipping."""
    return thresholded(scheduler, x0) if scheduler.config.get("thresholding") else clipped(scheduler, x0)


def thresholded_if_x0(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """UniPC thresholds only if x0 is what it goes on with."""
    return thresholded(scheduler, x0) if scheduler.predict_x0 else x0


def clipped_to_images(scheduler: Any, x0: torch.Tensor) -> torch.Tensor:
    """`clip_denoised` of consistency models, which have no latents."""
    return x0.clamp(-1, 1) if scheduler.config.get("clip_denoised") else x0


class SampleSpace(NamedTuple):
    """What a scheduler means by its sample and by its model's output.

    Attributes:
        coefficients: `(scheduler, timestep) -> (skip, out)` of x0 = skip·sample + out·model_output.
        bound: `(scheduler, x0) -> x0`: what `step` does to its x0. None where it does nothing, whatever the config
            says: `from_config` keeps settings of the scheduler before, so one counts only where the class reads it.
    """

    coefficients: Callable[[Any, Any], AffineCoefficients]
    bound: Callable[[Any, torch.Tensor], torch.Tensor] | None = None


SAMPLE_SPACES = {
    "DDIMScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "DDIMParallelScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "DDPMScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "DDPMParallelScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "LCMScheduler": SampleSpace(from_alphas, thresholded_or_clipped),
    "UnCLIPScheduler": SampleSpace(from_alphas, clipped),
    "PNDMScheduler": SampleSpace(from_alphas),
    "TCDScheduler": SampleSpace(from_alphas),
    "DDPMWuerstchenScheduler": SampleSpace(from_cosine_time),
    "EulerDiscreteScheduler": SampleSpace(from_sigmas),
    "EulerAncestralDiscreteScheduler": SampleSpace(from_sigmas),
    "HeunDiscreteScheduler": SampleSpace(from_sigmas, clipped),
    "LMSDiscreteScheduler": SampleSpace(from_sigmas),
    "KDPM2DiscreteScheduler": SampleSpace(from_interpolated_sigmas),
    "KDPM2AncestralDiscreteScheduler": SampleSpace(from_ancestral_interpolated_sigmas),
    "DPMSolverSDEScheduler": SampleSpace(from_midpoint_sigmas),
    "DPMSolverMultistepScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "DPMSolverSinglestepScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "DEISMultistepScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "SASolverScheduler": SampleSpace(from_solver_sigmas, thresholded),
    "UniPCMultistepScheduler": SampleSpace(from_solver_sigmas, thresholded_if_x0),
    "FlowMatchEulerDiscreteScheduler": SampleSpace(from_flow_sigmas),
    "FlowMatchHeunDiscreteScheduler": SampleSpace(from_flow_sigmas),
    "FlowMatchLCMScheduler": SampleSpace(from_flow_sigmas),
    "SCMScheduler": SampleSpace(from_angle),
    "IPNDMScheduler": SampleSpace(from_own_tables),
    "EDMEulerScheduler": SampleSpace(from_edm),
    "EDMDPMSolverMultistepScheduler": SampleSpace(from_edm, thresholded),
    "CosineDPMSolverMultistepScheduler": SampleSpace(from_edm),
    "CMStochasticIterativeScheduler": SampleSpace(from_consistency, clipped_to_images),
}

WITHOUT_ESTIMATE = {
    "AmusedScheduler": "samples discrete tokens",
    "BlockRefinementScheduler": "samples discrete tokens",
    "DiscreteDDIMScheduler": "samples discrete tokens",
    "EntropyBoundScheduler": "samples discrete tokens",
    "VQDiffusionScheduler": "samples discrete tokens",
    "DDIMInverseScheduler": "runs from an image to its noise",
    "DPMSolverMultistepInverseScheduler": "runs from an image to its noise",
    "CogVideoXDDIMScheduler": "is made for video",
    "CogVideoXDPMScheduler": "is made for video",
    "HeliosScheduler": "is made for video",
    "HeliosDMDScheduler": "is made for video",
    "LTXEulerAncestralRFScheduler": "is made for video",
    "MiniMaxH3Scheduler": "is made for video",
    "RFD4ProteinaScheduler": "is made for proteins",
    "PiflowScheduler": "takes a policy over many times from its model",
    "FlowMapEulerDiscreteScheduler": "takes a mean velocity between two times from its model",
    "ScoreSdeVeScheduler": "takes a score from its model",
    "ScoreSdeVpScheduler": "takes a score from its model",
    "KarrasVeScheduler": "takes two noise levels for a step",
    "RePaintScheduler": "takes a known image and a mask for a step",
    "ConsistencyDecoderScheduler": "decodes latents",
}


def space_of(scheduler: Any) -> SampleSpace:
    """The space of a scheduler by the names of its classes: a copy from the Hub is another class of the same name."""
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    known = next((name for name in names if name in SAMPLE_SPACES or name in WITHOUT_ESTIMATE), None)
    if known in SAMPLE_SPACES:
        return SAMPLE_SPACES[known]
    raise TypeError(
        f"Expected an image scheduler of diffusers whose x0 estimate is known, but got {names[0]}, which "
        f"{WITHOUT_ESTIMATE.get(known or '', 'is not one of them')}. Give the pipeline another one, such as "
        "`DDIMScheduler.from_config(pipe.scheduler.config)`, or `FlowMatchEulerDiscreteScheduler` for flow matching."
    )


# pipelines/chunks.py


SAME_FOR_ALL = ("sigmas", "timesteps")  # lists of numbers that are not one for each image
PLAIN_VALUES = (str, int, float, bool, type(None))
ChunkRun = Callable[[list[int], torch.Tensor], torch.Tensor]


class WholeBatchDraws(TorchFunctionMode):
    """Random numbers for some images of a batch, as the whole batch would have drawn them from its one generator.

    Samplers that add noise on the way draw for the images that they have; inside this context a `torch.randn` for so
    many images from this generator draws for all and keeps the rows, so that the stream goes on as in the whole batch.

    Args:
        generator: The generator of the call.
        batch: How many images the whole batch has.
        rows: Which of them are drawn here.
    """

    def __init__(self, generator: torch.Generator, batch: int, rows: list[int]) -> None:
        super().__init__()
        self.generator, self.batch, self.rows = generator, batch, rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.randn or kwargs.get("generator") is not self.generator:
            return func(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "size"}
        shape = kwargs["size"] if "size" in kwargs else args if isinstance(args[0], int) else args[0]
        if shape[0] != len(self.rows):
            return func(shape, **rest)
        return func((self.batch, *shape[1:]), **rest)[self.rows]


class ChunkedRun(torch.autograd.Function):
    """`run(rows, noise[rows])` of all chunks of a batch, with the memory of one: the backward pass runs each again.

    The gradient is that of the joint run, as no image depends on the noise of another.
    """

    @staticmethod
    def forward(ctx: Any, noise: torch.Tensor, run: ChunkRun, chunks: list[list[int]]) -> torch.Tensor:
        ctx.save_for_backward(noise)
        ctx.run, ctx.chunks = run, chunks
        return run_each(run, noise, chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore
        (noise,) = ctx.saved_tensors
        found = torch.empty_like(noise)
        for rows in ctx.chunks:
            found[rows] = chunk_gradient(ctx.run, rows, noise[rows], gradient[rows])
        return found, None, None


def run_in_chunks(run: ChunkRun, noise: torch.Tensor, chunk_size: int, differentiable: bool) -> torch.Tensor:
    """`run` of a batch `(B, ...)`, at most `chunk_size` images at a time.

    Args:
        run: Rows of the batch, and their noise, to what is drawn of them.
        noise: `(B, ...)`.
        chunk_size: 1 or more.
        differentiable: Whether the result has a gradient, where the noise has one.
    """
    chunks = [rows.tolist() for rows in torch.arange(len(noise)).split(chunk_size)]
    if differentiable and noise.requires_grad:
        return ChunkedRun.apply(noise, run, chunks)  # pyright: ignore[reportReturnType]
    return run_each(run, noise.detach(), chunks)


def run_each(run: ChunkRun, noise: torch.Tensor, chunks: list[list[int]]) -> torch.Tensor:
    """The results of all chunks in one tensor, without a graph."""
    first = run(chunks[0], noise[chunks[0]].detach())
    found = first.new_empty(len(noise), *first.shape[1:])
    found[chunks[0]] = first
    for rows in chunks[1:]:
        found[rows] = run(rows, noise[rows].detach())
    return found


def chunk_gradient(run: ChunkRun, rows: list[int], noise: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of one chunk with respect to its noise; the graph is gone on return."""
    with torch.enable_grad():
        leaf = noise.detach().requires_grad_()
        output = run(rows, leaf)
    (found,) = torch.autograd.grad(output, leaf, gradient)
    return found


class BatchLayout:
    """Which prompt each image of a call has, and so what an argument of the call is for some of its images.

    Args:
        request: The arguments of the call.
        batch: B, how many images it draws.
    """

    def __init__(self, request: dict[str, Any], batch: int) -> None:
        self.request, self.batch = request, batch
        prompt = request.get("prompt")
        prompt = request.get("prompt_embeds") if prompt is None else prompt
        self.prompts = 1 if prompt is None or isinstance(prompt, str) else len(prompt)

    def prompt_rows(self, rows: list[int]) -> list[int]:
        """The prompt of each image: those of a prompt lie one after the other."""
        return [row * self.prompts // self.batch for row in rows]

    def request_of(self, rows: list[int]) -> dict[str, Any]:
        """The arguments of a call for these images alone.

        Raises:
            ValueError: For an argument that may hold something for each image and is none of the prompts.
        """
        for name, value in self.request.items():
            check_for_all(name, value)
        if self.prompts == 1:
            found, count = dict(self.request), len(rows)
        else:
            found, count = {name: self.picked(name, value, rows) for name, value in self.request.items()}, 1
        return found | ({"num_images_per_prompt": count} if "num_images_per_prompt" in found else {})

    def picked(self, name: str, value: Any, rows: list[int]) -> Any:
        """An argument for the prompts of these images; what is no argument for each prompt as it is."""
        if "prompt" not in name or isinstance(value, str) or not hasattr(value, "__len__"):
            return value
        return take(value, self.prompt_rows(rows)) if len(value) == self.prompts else value

    def encoded_of(self, value: Any, rows: list[int]) -> Any:
        """What `encode_prompt` returned, for these images.

        Tensors and lists have an entry for each image, or for each prompt where the pipeline repeats them itself;
        position ids `(L, 3)`, as those of Flux, are the same for all.

        Raises:
            ValueError: For a tensor with neither.
        """
        if isinstance(value, dict):
            return {name: self.encoded_of(part, rows) for name, part in value.items()}
        if isinstance(value, torch.Tensor):
            return self.tensor_of(value, rows)
        if isinstance(value, list) and len(value) == self.batch:
            return take(value, rows)
        if isinstance(value, list) and len(value) == self.prompts > 1:
            return take(value, self.prompt_rows(rows))
        if isinstance(value, (tuple, list)):
            return type(value)([self.encoded_of(part, rows) for part in value])
        return value

    def tensor_of(self, value: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if value.ndim == 0 or (value.ndim == 2 and value.shape[1] == 3):
            return value
        if len(value) == self.batch:
            return value[rows]
        if len(value) == self.prompts:
            return value if self.prompts == 1 else value[self.prompt_rows(rows)]
        raise ValueError(
            f"Expected `encode_prompt` to return tensors with an entry for each of {self.batch} images, but got the "
            f"shape {tuple(value.shape)}, of which no part can be told apart. Use `chunk_size=None`."
        )


def take(value: Any, rows: Sequence[int]) -> Any:
    """The rows of a tensor, or of a list or tuple."""
    return value[list(rows)] if hasattr(value, "shape") else type(value)(value[row] for row in rows)


def check_for_all(name: str, value: Any) -> None:
    """Raise `ValueError` for an argument that is no prompt and may hold something for each image."""
    if "prompt" in name or name in SAME_FOR_ALL:
        return
    if (name.startswith("ip_adapter") and value is not None) or holds_several(value):
        raise ValueError(
            f"Expected arguments that are the same for all images, to draw some of them by themselves, but got "
            f"`{name}`, which may hold one for each. Use `chunk_size=None`."
        )


def holds_several(value: Any) -> bool:
    """Whether there are several tensors, images or the like in an argument: numbers and strings are settings."""
    if isinstance(value, dict):
        return any(map(holds_several, value.values()))
    if getattr(value, "ndim", 0) > 0:  # torch and numpy
        return len(value) > 1
    return isinstance(value, (list, tuple)) and len(value) > 1 and not all(isinstance(x, PLAIN_VALUES) for x in value)


# pipelines/global_draws.py


DRAWING = (torch.randn, torch.rand, torch.randint, torch.randn_like, torch.rand_like, torch.normal)


class GlobalDraws(TorchFunctionMode):
    """Inside this context a random number that comes from no generator raises `ValueError`. Other threads may draw.

    Args:
        sampler: What the error says that draws.
    """

    def __init__(self, sampler: str) -> None:
        super().__init__()
        self.sampler = sampler

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DRAWING and kwargs.get("generator") is None:
            raise ValueError(
                f"Expected all noise to come from `generator`, but {self.sampler} draws some on the way from torch's "
                "own stream, so that no two evaluations would see the same. Use a scheduler that draws nothing, as "
                "`FlowMatchEulerDiscreteScheduler(stochastic_sampling=False)`, or whose seed is a setting, as "
                "`DPMSolverSDEScheduler(noise_sampler_seed=0)`."
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_global_draws(pipe) -> Iterator[list[torch.Tensor]]:
    """Let no `scheduler.step` of a pipeline draw from torch's own stream; see `GlobalDraws`. Its scheduler is a copy.

    Every inner run begins with the generators in the same state, so that all of them see the same noise on the way.
    Yields an empty list, as `first_step_only` does.
    """
    scheduler, sampler = pipe.scheduler, f"{type(pipe).__name__} with {type(pipe.scheduler).__name__}"
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args, **kwargs):
        with GlobalDraws(sampler):
            return step(*args, **kwargs)

    vars(scheduler)["step"] = watched
    try:
        yield []
    finally:
        del scheduler.step


# pipelines/sampling.py


Gradient = Literal["full", "frozen"] | None
Clamp = Literal["straight_through", "hard"]


def stock_call(cls: type):
    """The `__call__` of the stock pipeline class under our hook, without its `@torch.no_grad`."""
    for base in cls.__mro__:
        if "__call__" in vars(base) and not hasattr(base, "_noise_run"):
            return inspect.unwrap(vars(base)["__call__"])
    raise TypeError(f"Expected a diffusers pipeline with a `__call__`, but {cls.__name__} has none.")


class RandomState:
    """The random streams of a call, as they were at one moment: every inner run starts from the same state."""

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, device: torch.device) -> None:
        self.several = isinstance(generator, list)
        streams = generator if isinstance(generator, list) else [generator or default_generator(device)]
        self.states = [(stream.device, stream.get_state(), stream.initial_seed()) for stream in streams]

    @property
    def seeds(self) -> list[int]:
        return [seed for _, _, seed in self.states]

    def generator(self) -> torch.Generator | list[torch.Generator]:
        """Fresh generators in this state, in the form that the pipeline was given."""
        fresh = []
        for device, state, _ in self.states:
            fresh.append(torch.Generator(device))
            fresh[-1].set_state(state)
        return fresh if self.several else fresh[0]

    def of_rows(self, rows: list[int]) -> "RandomState":
        """The streams of some images, or the one that all images share."""
        found = copy.copy(self)
        found.states = [self.states[row] for row in rows] if self.several else self.states
        return found


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on `device` when none is given."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


class PipelineSampler:
    """One pipeline call as `images(noise)` and `x0(noise)`.

    Works on a shallow twin of the pipeline that shares its modules: the scheduler is a copy, `encode_prompt` replays
    what the outer call recorded, in call order, and `prepare_latents` returns our noise through the stock scaling and
    packing.

    Args:
        pipe: The pipeline whose call is under way, after its prompts were encoded.
        request: The arguments of that call.
        encoded: What `encode_prompt` returned, in call order.
        space: The noise and latents of the call.
        random_state: The streams before the base noise was drawn.
        drew: Whether the outer call drew its base noise; if so each inner call draws and discards, to leave samplers
            that add noise on the way the same stream.
        clamp: How pixels are brought into [0, 1]: "straight_through" keeps the gradient of saturated pixels, so that
            they can come back; "hard" (as stock pipelines do) has none there. The values are equal.
        decoder: What decodes latents in the place of the pipeline's VAE; `None` for that.
        checkpointing: What is computed again in the backward pass, once `checkpoints` are in force.
        through_denoiser: Whether gradients pass through the denoiser, so that there is anything of it to be kept.

    Attributes:
        timesteps: How many the whole chain has, once it has been run; `None` before.
        checkpoints: What is computed again, of the whole batch and of its parts.
    """

    timesteps: int | None = None

    def __init__(
        self,
        pipe,
        request: dict[str, Any],
        encoded: list,
        space: LatentSpace,
        random_state: RandomState,
        drew: bool,
        clamp: Clamp = "straight_through",
        decoder: Any = None,
        checkpointing: Checkpointing = "none",
        through_denoiser: bool = True,
    ) -> None:
        self.space, self.encoded, self.random_state, self.drew = space, encoded, random_state, drew
        self.call = stock_call(type(pipe))
        ours = ("latents", "generator", "output_type", "return_dict", "callback_on_step_end", "callback")
        self.request = {name: value for name, value in request.items() if name not in ours}
        self.image_embeds: list[Any] = []  # of an IP-Adapter: what its method returned in the first run, in call order
        self.twin = self.make_twin(pipe, clamp)
        self.own_decoder, self.decoder = vars(self.twin).get("vae"), decoder
        if decoder is not None:
            vars(self.twin)["vae"] = decoder
        called = parts_of(self.twin, CALLED_IN_STEPS).values() if through_denoiser else ()
        decodes = vars(self.twin).get("vae")
        self.checkpoints = Checkpoints(checkpointing, tuple(called), decodes, scales_lora(self.request))
        # as it was before any run: schedulers hold the graph of one afterwards, so that each run has its own copy
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.part_of: tuple[int, list[int]] | None = None  # the size of the whole batch, and which rows of it are drawn
        self.chunks: dict[tuple[int, ...], PipelineSampler] = {}

    def make_twin(self, pipe, clamp: str):
        twin = copy.copy(pipe)
        attributes = vars(twin)
        attributes.pop("_noise_run", None)
        attributes["_progress_bar_config"] = {"disable": True}
        # both go through numpy, which no gradient passes; the final run has them
        attributes.update({name: None for name in ("safety_checker", "watermark") if name in attributes})
        vae = attributes.get("vae")
        upcast = vae is not None and vae.config.get("force_upcast") and vae.dtype == torch.float16
        if upcast and not is_offloaded(vae):  # no gradient passes one that is offloaded
            attributes["vae"] = converted_apart(vae)
        if clamp == "straight_through" and hasattr(pipe, "image_processor"):
            attributes["image_processor"] = copy.copy(pipe.image_processor)
            vars(twin.image_processor)["denormalize"] = denormalize_straight_through
        return twin

    def with_own_decoder(self) -> "PipelineSampler":
        """The same sampler with the pipeline's own decoder."""
        found = copy.copy(self)
        found.twin, found.chunks, found.decoder = copy.copy(self.twin), {}, None
        vars(found.twin)["vae"] = self.own_decoder
        return found

    def random_state_after_draw(self) -> RandomState:
        """The random streams once the base noise is drawn."""
        generator = self.random_state.generator()
        if self.drew:
            self.space.on(self.twin, self.space.draw_noise, generator=generator)
        return RandomState(generator, torch.device("cpu"))

    def prepare(self, pipe, noise: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None):
        """What `prepare_latents` of the call returns for another noise; all else that it draws is the same."""
        generator = generator or self.random_state.generator()
        return self.space.prepare(pipe, noise, draw=self.drew, generator=generator)

    def to_latents(self, pipe, noise: torch.Tensor) -> torch.Tensor:
        """Noise to what the pipeline takes as `latents=`, in its dtype."""
        return self.space.to_latents(pipe, noise, draw=self.drew, generator=self.random_state.generator())

    def states_after_draw(self) -> list[tuple[str, torch.Tensor]]:
        """Device type and state of each random stream once the base noise is drawn."""
        return [(device.type, state) for device, state, _ in self.random_state_after_draw().states]

    def chunk(self, rows: list[int]) -> "PipelineSampler":
        """A sampler of some images of the batch alone: what the whole batch draws in these rows, but for rounding.

        Samplers that add noise on the way see the same noise, if they draw it from the generator of the call.

        Raises:
            ValueError: Naming an argument of the call that cannot be told apart by image, such as a list of images.
        """
        if tuple(rows) not in self.chunks:
            batch = self.space.arguments.get("batch_size", 0)
            layout = BatchLayout(self.request, batch)
            part = copy.copy(self)
            part.space = self.space.for_images(len(rows))
            part.request = layout.request_of(rows)
            part.encoded = [layout.encoded_of(each, rows) for each in self.encoded]
            part.random_state, part.drew = self.random_state_after_draw().of_rows(rows), False
            part.part_of, part.chunks, part.image_embeds = (batch, rows), {}, []
            self.chunks[tuple(rows)] = part
        return self.chunks[tuple(rows)]

    def images(
        self,
        noise: torch.Tensor,
        gradient: Gradient = None,
        preview: bool = False,
        chunk_size: int | None = None,
    ) -> torch.Tensor:
        """`noise` (B, C, H, W) to images (B, 3, H, W) in [0, 1], float32 or better.

        Args:
            noise: The initial noise.
            gradient: "full" back-propagates through the whole chain; "frozen" holds the model's outputs constant, so no
                graph is kept in the denoiser; `None` keeps no graph at all.
            preview: Draw the x0 estimate of the first model call instead of the whole chain.
            chunk_size: Draw at most so many images at a time, and draw them again, with their graph, in the backward
                pass: the same gradient in the memory of so many images, for one more forward pass. `None` for all.
        """
        if chunk_size is not None and chunk_size < len(noise):

            def draw(rows: list[int], part: torch.Tensor) -> torch.Tensor:
                return self.chunk(rows).images(part, gradient, preview)

            return run_in_chunks(draw, noise, chunk_size, gradient is not None)
        images = self.run(noise, gradient, preview, "pt")
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def x0(self, noise: torch.Tensor, gradient: Gradient = None, chunk_size: int | None = None) -> torch.Tensor:
        """`noise` (B, C, H, W) to the x0 estimate of the first model call, in the layout of the noise; see `images`."""
        if chunk_size is not None and chunk_size < len(noise):
            return run_in_chunks(
                lambda rows, part: self.chunk(rows).x0(part, gradient), noise, chunk_size, gradient is not None
            )
        latents = self.run(noise, gradient, True, "latent")
        return self.space.unpack(self.twin, latents)

    def run(self, noise: torch.Tensor, gradient: Gradient, preview: bool, output_type: str) -> torch.Tensor:
        """What the pipeline puts out for a noise; the latents of a preview are the x0 estimate, in no other layout.

        With a graph, it is as the checkpointing says.
        """
        if gradient is None or not noise.requires_grad:
            return self.run_once(noise, gradient, preview, output_type)
        kind = (preview, output_type)
        return self.checkpoints.fitted(kind, noise.device, lambda: self.run_once(noise, gradient, preview, output_type))

    def run_once(self, noise: torch.Tensor, gradient: Gradient, preview: bool, output_type: str) -> torch.Tensor:
        twin = self.fresh_twin(noise, gradient)
        watched = first_step_only(twin) if preview else no_global_draws(twin)
        ours = {"generator": twin.sampling_generator, "output_type": output_type, "return_dict": False}
        draws, graph = self.draws_from(twin.sampling_generator), gradient is not None and noise.requires_grad
        try:
            with watched as estimates, draws, torch.set_grad_enabled(graph):
                output = self.call(twin, **self.request, **ours)[0]
            if estimates and output_type == "latent":  # families unpack and scale what they put out
                output = estimates[0]
            if not preview:  # some families set their timesteps after `prepare_latents`: no scheduler knows them before
                self.timesteps = count_timesteps(twin)
        finally:  # its methods refer to it: its scheduler would keep the graph until the next collection
            vars(twin).clear()
        if noise.requires_grad and gradient is not None and not output.requires_grad:
            raise ValueError(
                f"Expected {type(twin).__name__} to be differentiable from image to noise, but its result carries no "
                "gradient. Use a method without gradients, such as `BestOfN`."
            )
        return output

    def draws_from(self, generator: torch.Generator | list[torch.Generator]) -> contextlib.AbstractContextManager[Any]:
        """Lets a part of a batch that shares one generator draw from it as the whole batch does."""
        if self.part_of is None or isinstance(generator, list):
            return contextlib.nullcontext()
        return WholeBatchDraws(generator, *self.part_of)

    def fresh_twin(self, noise: torch.Tensor, gradient: Gradient):
        twin = copy.copy(self.twin)
        generator = self.random_state.generator()
        replay = iter(self.encoded)

        vars(twin).update(
            scheduler=copy.deepcopy(self.scheduler),
            encode_prompt=lambda *_, **__: next(replay),
            prepare_latents=lambda *_, **__: self.prepare(twin, noise, generator),
            sampling_generator=generator,
        )
        if hasattr(twin, "prepare_ip_adapter_image_embeds"):
            embed = twin.prepare_ip_adapter_image_embeds
            vars(twin)["prepare_ip_adapter_image_embeds"] = replayed(embed, self.image_embeds)
        if gradient == "frozen":
            vars(twin).update({name: without_gradient(part) for name, part in parts_of(twin, CALLED_IN_STEPS).items()})
        elif gradient == "full":
            parts = parts_of(twin, CALLED_IN_STEPS)
            vars(twin).update({name: self.checkpoints.call_of(part) for name, part in parts.items()})
        return twin


def parts_of(pipe, names: tuple[str, ...]) -> dict[str, Any]:
    """The modules that a pipeline has of these."""
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


def replayed(function: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    """A function that returns what is kept of its earlier calls, in call order, and keeps what it computes beyond."""
    index = itertools.count()

    def replay(*args, **kwargs):
        call = next(index)
        if call == len(kept):
            with torch.no_grad():
                kept.append(function(*args, **kwargs))
        return kept[call]

    return replay


@contextlib.contextmanager
def first_step_only(pipe) -> Iterator[list[torch.Tensor]]:
    """Let a pipeline make one model call, whose `step` returns the x0 estimate. It and its scheduler must be copies.

    The loop is stopped by `pipe.interrupt`, or in families that do not look at it by cutting the list of timesteps.

    Yields:
        An empty list, for the estimate.

    Raises:
        TypeError: If the pipeline takes no step, or takes one before a denoiser was called.
    """
    scheduler, interruptible = pipe.scheduler, "interrupt" in stock_call(type(pipe)).__code__.co_names
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    calls: list[int] = []
    stepped: list[bool] = []  # for each step whether a denoiser had been called
    estimates: list[torch.Tensor] = []

    @functools.wraps(set_timesteps)
    def set_one(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        if not interruptible:
            scheduler.timesteps = scheduler.timesteps[:1]

    @functools.wraps(step)
    def estimate(model_output, timestep, sample, *_, **__):
        stepped.append(bool(calls))
        x0 = predict_x0(scheduler, model_output, timestep, sample).to(model_output.dtype)
        estimates.append(x0)
        pipe._interrupt = True
        return (x0, x0)

    vars(scheduler).update(set_timesteps=set_one, step=estimate)
    # copies that count: a hook on modules that others have too would have to be taken off again, whatever happens
    parts = parts_of(pipe, DENOISERS)
    vars(pipe).update({name: with_forward(part, counted(part.forward, calls)) for name, part in parts.items()})
    try:
        yield estimates
    finally:
        del scheduler.set_timesteps, scheduler.step
    if not all(stepped or [False]):
        raise TypeError(
            f"Expected a pipeline that calls its denoiser ({', '.join(DENOISERS)}) before the first `scheduler.step`, "
            f"but {type(pipe).__name__} does not, and no x0 can be estimated. Use a method that looks at images."
        )


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """The function, with an entry in `calls` for each call."""

    @functools.wraps(function)
    def count(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return count


def count_timesteps(pipe) -> int:
    """How many timesteps the loop of a call had: pipelines may take a part of those of the scheduler."""
    return getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)


def denormalize_straight_through(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to [0, 1] as diffusers does it, with the clamp's value and the identity's gradient."""
    pixels = images * 0.5 + 0.5
    clamped = pixels.clamp(0, 1)
    return clamped.detach() + (pixels - pixels.detach()) if pixels.requires_grad else clamped  # adds exactly 0


class Sample:
    """What an objective may look at, computed once and only if asked for.

    Attributes:
        noise: `(B, C, H, W)`, the initial noise.
        prompts: `B` prompts.
        groups: `B` integers, equal where images share their prompt.
        seeds: `B` integers that differ from step to step and from image to image: for objectives that draw at random.
        images: `(B, 3, H, W)` in [0, 1]: the result of the whole chain, or of one model call for a preview.
        x0: `(B, C, H, W)`: the estimate of the clean latents after one model call.
        chunk_size: At most so many images are held in memory with their graphs at a time, `None` for all; objectives
            with models of their own keep to it.
    """

    def __init__(
        self,
        sampler: PipelineSampler,
        noise: torch.Tensor,
        prompts: list[str],
        groups: list[int],
        seeds: list[int],
        gradient: Gradient,
        preview: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        self.sampler, self.noise, self.prompts = sampler, noise, prompts
        self.groups, self.seeds = groups, seeds
        self.gradient: Gradient = gradient
        self.preview, self.chunk_size = preview, chunk_size

    @functools.cached_property
    def images(self) -> torch.Tensor:
        return self.sampler.images(self.noise, self.gradient, self.preview, self.chunk_size)

    @functools.cached_property
    def x0(self) -> torch.Tensor:
        return self.sampler.x0(self.noise, self.gradient, self.chunk_size)

    @property
    def drawn_images(self) -> torch.Tensor | None:
        """The images if the objective asked for them, without their graph."""
        images = vars(self).get("images")
        return None if images is None else images.detach()


# pipelines/noise_problem.py


@dataclasses.dataclass(eq=False)
class NoiseProblem:
    """One pipeline call whose noise is to be found.

    Attributes:
        pipe: The pipeline.
        sampler: Noise to images.
        space: Noise to latents.
        noise: `(B, C, H, W)`, the base noise, float32 or better.
        prompts: `B` prompts for the rewards.
        groups: `B` integers, equal where images share their prompt.
        dtype: What the pipeline draws its noise in.
        request: The arguments of the call, for the provenance.
    """

    pipe: Any
    sampler: PipelineSampler
    space: LatentSpace
    noise: torch.Tensor
    prompts: list[str]
    groups: list[int]
    dtype: torch.dtype
    request: dict[str, Any]

    @functools.cached_property
    def seeds(self) -> list[int]:
        """One for each image, from the bits of its base noise: none depends on the rest of the batch."""
        return [seed_from(noise) for noise in self.noise]


class CandidateNoise:
    """Fresh noises of a problem, by its noise sampler: for the same seeds the same, whatever batch they are drawn in.

    (A sampler that couples the samples of a batch couples these as well.)

    The streams are seeded from the base noise of each sample, so that they neither repeat the pipeline's own draws nor
    depend on the other samples of the batch.
    """

    def __init__(self, problem: NoiseProblem) -> None:
        self.like, self.draw_noise = problem.noise, problem.space.draw_noise
        self.streams = [torch.Generator().manual_seed(seed) for seed in problem.seeds]

    def draw(self) -> torch.Tensor:
        """`(B, C, H, W)`, unit variance; standard Gaussian unless the problem has a noise sampler."""
        return self.draw_noise(tuple(self.like.shape), self.streams, self.like.device, self.like.dtype)

    def uniform(self) -> torch.Tensor:
        """`(B,)` uniform in [0, 1), float64."""
        draws = [torch.rand((), generator=stream, dtype=torch.float64) for stream in self.streams]
        return torch.stack(draws).to(self.like.device)


def seed_from(noise: torch.Tensor) -> int:
    """A 62-bit seed that is a function of the values of a noise."""
    bits = noise.detach().flatten().cpu().to(torch.float32).view(torch.int32).to(torch.int64)
    weights = torch.arange(1, len(bits) + 1).mul(0x9E3779B97F4A7C15 - 2**64)  # odd multiples spread over 64 bits
    return int((bits * weights).sum().item()) & (2**62 - 1)


# pipelines/objectives.py


class Objective:
    """`objective(sample) -> (B,)`, lower is better. `evaluate` also reports what it is made of.

    Attributes:
        requires_prompt: Whether the prompts are looked at.
    """

    requires_prompt: bool = False

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss `(B,)` with its graph, and named raw scores `(B,)` without."""
        raise NotImplementedError(f"{type(self).__name__} must define `evaluate(sample)`.")

    def __call__(self, sample: Sample) -> torch.Tensor:
        return self.evaluate(sample)[0]

    def check_groups(self, groups: Sequence[int]) -> None:
        """Raise `ValueError` for a batch that cannot be compared, before any model runs; see `Sample.groups`."""

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        """Raise for user code that cannot work on images of this size, before any model runs."""

    def describe(self) -> Any:
        """What goes into the provenance of a result: plain values."""
        return type(self).__name__


class FunctionObjective(Objective):
    """A plain function `(sample) -> (B,)` as an objective."""

    def __init__(self, function: Callable[[Sample], torch.Tensor]) -> None:
        self.function = function

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.function(sample), {}

    def describe(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


def differentiable_rewards(rewards: Any, device: torch.device) -> RewardSum:
    """A `RewardSum` that loads names onto `device`. Raises `NonDifferentiableReward` where one that counts has none."""
    total = RewardSum(rewards, device=device)
    total.check_differentiable()
    return total


class RewardObjective(Objective):
    """The negative weighted sum of rewards of the images: `−Σᵢ λᵢ·rewardᵢ(images, prompts)`.

    Args:
        rewards: Anything that `RewardSum` takes, or a `RewardSum`.
        prompts: Ask the rewards about these instead of the pipeline's prompts: one, or one for each image.
        views: The value stays that of the image itself, but the gradient is the mean of so many random views of it; see
            `random_views`. 0 for the gradient of the image itself.
    """

    def __init__(self, rewards: Any, prompts: str | Sequence[str] | None = None, views: int = 0) -> None:
        self.rewards = rewards if isinstance(rewards, RewardSum) else RewardSum(rewards)
        self.prompts = prompts
        self.requires_prompt = self.rewards.requires_prompt and prompts is None
        self.views = views

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        prompts = self.prompts if self.prompts is not None else sample.prompts
        images = sample.images
        by_views = self.views > 0 and images.requires_grad
        output = self.rewards(images.detach() if by_views else images, prompts, chunk_size=sample.chunk_size)
        if not by_views:
            return -output.total, output.components
        gradient = self.gradient_by_views(images, prompts, sample.seeds, sample.chunk_size or len(images))
        return -AttachedGradient.apply(images, output.total, gradient), output.components  # pyright: ignore

    def gradient_by_views(
        self, images: torch.Tensor, prompts: Any, seeds: Sequence[int], chunk_size: int
    ) -> torch.Tensor:
        """The mean gradient `(B, 3, H, W)` of random views with respect to the pixels, a few images at a time."""
        gradient = torch.empty_like(images)
        for start in range(0, len(images), chunk_size):
            rows = slice(start, start + chunk_size)
            leaf, texts = images[rows].detach().requires_grad_(), part_of_prompts(prompts, rows)
            views = random_views(leaf, self.views, seeds[rows])
            total = torch.stack([self.optimised(view, texts).total.sum() for view in views]).mean()
            gradient[rows] = torch.autograd.grad(total, leaf)[0] if total.requires_grad else 0
        return gradient

    @functools.cached_property
    def optimised(self) -> RewardSum:
        """The rewards that have a weight."""
        return self.rewards.optimised()

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        """Score one random image with each plain callable: its shape, its numbers and, if asked for, its gradient.

        The project's own rewards are tested to meet the contract: they only say whether they take images of this size.
        """
        prompt = self.first_prompt(prompt)
        for name, reward in zip(self.rewards.names, self.rewards.rewards, strict=True):
            if not hasattr(reward, "function"):
                reward.check_size(prompt, height, width)  # pyright: ignore[reportCallIssue]
                continue
            if gradient and self.rewards.weights[name]:
                check_gradient(reward, prompt, height, width)  # pyright: ignore[reportArgumentType]
            else:
                reward(torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)), prompt)

    def first_prompt(self, prompt: str) -> str:
        """What the first image is scored by: its own prompt, unless the rewards are asked about others."""
        asked = prompt if self.prompts is None else self.prompts
        return asked if isinstance(asked, str) else asked[0]

    def describe(self) -> dict[str, Any]:
        return self.rewards.describe()


# pipelines/provenance.py


def provenance_of(problem: NoiseProblem, objective: Objective, state: NoiseState) -> dict[str, Any]:
    """Where a result came from, in plain values that JSON takes. The method adds itself."""
    pipe, scheduler = problem.pipe, problem.pipe.scheduler
    arguments = {name: value for name, value in problem.request.items() if name not in ("prompt", "latents")}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {
        "objective": objective.describe(),
        "prompts": problem.prompts,
        "seeds": problem.sampler.random_state.seeds,
        "generators": "list" if problem.sampler.random_state.several else "single",
        "noise_sampler": describe_noise_sampler(problem.space.noise_sampler),
        "model": str(pipe.config.get("_name_or_path") or "") or None,
        "revision": revision_of(pipe),
        "pipeline": type(pipe).__name__,
        "scheduler": {"class": type(scheduler).__name__, **plain(dict(scheduler.config))},
        "dtype": str(problem.dtype).removeprefix("torch."),
        "arguments": plain(arguments),
        "decoder": describe_decoder(problem.sampler.decoder),
        "checkpointing": problem.sampler.checkpoints.policy,
        "stopped": state.stopped,
        "seconds": round(state.elapsed, 3),
        "versions": {"python": platform.python_version(), **versions},
    }


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The entries that JSON takes as they are."""
    kept = (bool, int, float, str, type(None))
    flat = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {
        name: value
        for name, value in flat.items()
        if isinstance(value, kept) or isinstance(value, list) and all(isinstance(item, kept) for item in value)
    }


def revision_of(pipe) -> str | None:
    """The commit of the Hub snapshot that the modules were loaded from, if they were."""
    for part in pipe.components.values():
        config = getattr(part, "config", None)
        path = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(part, "name_or_path", None)
        if match := re.search(r"snapshots[/\\]([0-9a-f]{40})", str(path)):
            return match[1]
    return None


# pipelines/regularizers.py


@dataclasses.dataclass(frozen=True)
class ChiPrior:
    """Negative log-density of the norm of a d-dimensional standard Gaussian, up to a constant.

    ReNO, https://arxiv.org/abs/2406.04312, equation 4: `weight · (r²/2 − (d−1)·ln r)` with `r = ‖noise‖₂`. Its minimum
    is at `r = √(d−1)`, where the curvature is `2·weight`. It constrains the norm alone and is blind to the spectrum.

    Args:
        weight: λ_reg, at least 0. The paper uses 0.01.
    """

    weight: float = 0.01

    def __post_init__(self) -> None:
        if not self.weight >= 0 or math.isinf(self.weight):
            raise ValueError(f"Expected a prior weight of 0 or more, but got {self.weight}.")

    def __call__(self, noise: torch.Tensor) -> torch.Tensor:
        """`noise` (B, ...) to the penalty `(B,)`, each sample by itself; at least float32 whatever the noise is."""
        norm = per_sample_norm(noise)
        return self.weight * (norm.square() / 2 - (noise[0].numel() - 1) * norm.log())


def per_sample_norm(noise: torch.Tensor) -> torch.Tensor:
    """`(B, ...)` to the L2 norms `(B,)`, in float32 or better: in bfloat16 the spacing of numbers near 256 is 2."""
    return noise.flatten(1).to(torch.promote_types(noise.dtype, torch.float32)).norm(dim=1)


def per_image(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(B,)` values in a shape that broadcasts over `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def clip_per_sample(gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
    """`(B, ...)` scaled down where a sample's norm exceeds `max_norm`, as `clip_grad_norm_` does for a whole tensor."""
    factor = (max_norm / (per_sample_norm(gradient) + 1e-6)).clamp(max=1)
    return gradient * per_image(factor, gradient)


# pipelines/noise_optimizer.py


class NoiseOptimizer:
    """A method: what it looks at, how it moves the noise, what it returns. `run` owns the loop.

    Subclasses are frozen, keyword-only dataclasses whose fields are the method's settings.

    Attributes:
        steps: Evaluations, the plain result included: the noise is moved `steps − 1` times, or after each of them by a
            method that returns the last.
        gradient: "full", "frozen" or `None`; see `PipelineSampler.images`.
        preview: Look at the x0 estimate of one model call instead of the whole chain.
        clamp: "straight_through" or "hard"; see `PipelineSampler`.
        chunk_size: How many images are in memory with their graphs at a time: the gradient is the same, for one more
            forward pass. "auto" for as many as fit, by what the graph of one image holds; `None` for all.
        checkpointing: What of denoiser and decoder is computed again in the backward pass instead of kept: the same
            images and gradients in less memory. "none": nothing. "blocks": each block, for one more forward pass.
            "steps": each call of the denoiser, and in it each block, for two more; the memory hardly grows with the
            number of denoising steps. "auto": the first of these whose graph takes at most half of the free memory,
            counted while the first one is built. Beside a `chunk_size` that is a number, it is the graph of a chunk
            that has to fit; beside `chunk_size="auto"` images are drawn a few at a time only where "steps" is not
            enough for all.
        decoder: A tiny autoencoder that decodes in the place of the pipeline's own while the noise is optimised, an
            approximation for less time and memory: a Hub id such as "madebyollin/taesdxl", a folder, or a loaded
            module. The images of the result are drawn with the pipeline's own; see `NoiseResult`. `None` for that
            throughout.
        reward_device: Where rewards that are given by name are loaded, such as "cuda:1"; `None` for the pipeline's
            device. Those that are loaded already stay where they are.
        returns: "best", the noise of the lowest loss, or "last", the noise after the last move, which is not evaluated.
        final_steps: How many evaluations `finish` asks for after these steps.
    """

    steps: int
    gradient: Gradient = "full"
    preview: bool = False
    clamp: Clamp = "straight_through"
    chunk_size: ChunkSetting = None
    checkpointing: Checkpointing = "auto"
    decoder: Any = None
    reward_device: str | torch.device | None = None
    returns: ClassVar[Literal["best", "last"]] = "best"
    final_steps: int = 0

    def objective(self, pipe) -> Objective:
        """What is minimised. Called once, before any model runs: the place to refuse bad settings."""
        raise NotImplementedError(f"{type(self).__name__} must define `objective(pipe)`.")

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor | float:
        """`(B,)` penalty that steers the noise but does not count when the best is chosen."""
        return 0.0

    def start(self, problem: NoiseProblem) -> Any:
        """What the method remembers from step to step, such as momentum."""
        return None

    def step(self, state: NoiseState, gradient: Any, memory: Any) -> torch.Tensor:
        """The method: the next noise `(B, C, H, W)`.

        `state` holds what was evaluated: `state.noise`, its `state.loss`, the best so far; `gradient` `(B, C, H, W)` is
        that of the loss with respect to the noise, `None` for a method without; `memory` is what `start` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `step(state, gradient, memory)`.")

    def inspect(self, state: NoiseState, objective: Objective, memory: Any) -> torch.Tensor | None:
        """Look at what was evaluated, before the best is chosen and callbacks see it.

        Returns:
            `(B,)` bool, the samples for which this step may be the best; `None` is all. The first step counts in any
            case. Samples may be stopped: `state.stop(reason, samples)`.
        """
        return None

    def finish(self, state: NoiseState, objective: Objective, memory: Any) -> Iterable[torch.Tensor]:
        """Noises `(B, C, H, W)` to evaluate at the end, one after the other, also of a run that was stopped.

        For methods that choose among all that was seen; asked for the next when the last has been evaluated.
        """
        return ()

    def watchers(self) -> list[NoiseCallback]:
        """Callbacks that belong to the method, such as one that stops it; they see each step before the user's."""
        return []

    def check(self) -> None:
        """Raise `ValueError` for settings that cannot work."""
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Expected `steps` to be an integer of 1 or more, but got {self.steps!r}.")
        choices = {"gradient": ("full", "frozen", None), "clamp": ("straight_through", "hard")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Expected `{name}` to be one of {allowed}, but got {getattr(self, name)!r}.")
        check_chunk_size(self.chunk_size)
        check_checkpointing(self.checkpointing)
        check_reward_device(self.reward_device)

    def device_of_rewards(self, pipe) -> torch.device:
        """Where rewards that are given by name are loaded."""
        return torch.device(self.reward_device or pipe._execution_device)

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for the provenance."""
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        values = {field.name: getattr(self, field.name) for field in fields}
        return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | None)}

    def run(
        self,
        problem: NoiseProblem,
        objective: Objective,
        callbacks: CallbackSpec | Iterable[CallbackSpec] | None = None,
        noise_file: NoiseFile | None = None,
    ) -> NoiseResult:
        """Optimise. An exception on the way carries what was found so far as its `noise_result`.

        The file, if one is given, holds the best noise so far from the first step on, and the result at the end.
        """
        state = NoiseState(problem.pipe, problem.prompts, self.steps + self.final_steps, problem.noise)
        every = [ProgressBar(), *self.watchers(), *as_callbacks(callbacks)]
        loop = OptimizationLoop(self, problem, objective, state, every, noise_file)
        try:
            try:
                loop.run()
            finally:
                loop.end()
            return loop.saved_result()
        except BaseException as error:
            loop.rescue(error)
            raise


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepRow:
    """What is kept of a step: `(B,)` losses and norms, `(B, 3)` energies by band, and a `(B,)` for each score."""

    loss: torch.Tensor
    norm: torch.Tensor
    bands: torch.Tensor
    scores: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BestSoFar:
    """The best after so many steps. Replaced as a whole: Ctrl-C finds all that a step brought, or nothing of it."""

    steps: int
    noise: torch.Tensor
    step: torch.Tensor
    images: torch.Tensor | None


class OptimizationLoop:
    """One run of a method: its current noise, its best, its history. See `NoiseOptimizer.run`."""

    def __init__(
        self,
        method: NoiseOptimizer,
        problem: NoiseProblem,
        objective: Objective,
        state: NoiseState,
        callbacks: Sequence[NoiseCallback],
        noise_file: NoiseFile | None = None,
    ) -> None:
        self.method, self.problem, self.objective = method, problem, objective
        self.state, self.callbacks, self.noise_file = state, callbacks, noise_file
        self.rows: list[StepRow] = []
        self.best: BestSoFar | None = None
        self.initial_images: torch.Tensor | None = None
        self.redrawn: dict[str, torch.Tensor] = {}
        self.total: torch.Tensor | None = None
        self.leaf = self.evaluated = problem.noise

    def run(self) -> None:
        self.start()
        for step in range(self.method.steps):
            self.evaluate(step)
            if self.state.stopped or not self.moves_after(step):
                break
            self.move()
            if self.state.stopped:
                break
        self.finish()
        self.redraw()

    def start(self) -> None:
        self.chunk_size = chunk_size_of(self.method, self.problem)
        self.memory = self.method.start(self.problem)
        for callback in self.callbacks:
            if hasattr(callback, "on_run_start"):
                callback.on_run_start(self.state)

    def end(self) -> None:
        for callback in self.callbacks:
            if hasattr(callback, "on_run_end"):
                callback.on_run_end(self.state)

    def moves_after(self, step: int) -> bool:
        """Whether the noise is moved after this step: a best noise has been evaluated, a last one need not be."""
        return self.method.returns == "last" or step < self.method.steps - 1

    def evaluate(self, step: int) -> None:
        """Score the current noise, keep it where it is the best, and ask the callbacks."""
        state, method = self.state, self.method
        gradient = method.gradient if self.moves_after(step) else None
        self.leaf = state.noise.detach().requires_grad_(gradient is not None)
        sample = self.sample_of(self.problem.sampler, self.leaf, step, gradient, method.preview)
        try:
            with torch.set_grad_enabled(gradient is not None):
                loss, scores = self.objective.evaluate(sample)
                self.check_loss(loss, gradient, step)
                self.total = loss + method.regularizer(self.leaf)
        except NonFiniteReward as error:
            if step == 0:
                raise
            return self.give_up(str(error))
        state.step, state.images, state.scores = step, sample.drawn_images, scores
        self.evaluated = state.noise
        state.loss = loss.detach().where(state.active, torch.nan)
        self.record(method.inspect(state, self.objective, self.memory))
        for callback in self.callbacks:
            if callback.on_step_end(state) is False:
                state.stop()
        if self.noise_file is not None:
            self.noise_file.keep(self.result)

    def sample_of(
        self, sampler: PipelineSampler, noise: torch.Tensor, step: int, gradient: Gradient, preview: bool
    ) -> Sample:
        """What the objective looks at in a step."""
        seeds = [seed + step for seed in self.problem.seeds]
        groups, prompts = self.problem.groups, self.state.prompts
        return Sample(sampler, noise, prompts, groups, seeds, gradient, preview, self.chunk_size)

    def check_loss(self, loss: torch.Tensor, gradient: Gradient, step: int) -> None:
        batch = len(self.state.noise)
        if not isinstance(loss, torch.Tensor) or loss.shape != (batch,):
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"Expected the objective to return a tensor of shape ({batch},), but got {got}.")
        if gradient is not None and not loss.requires_grad:
            raise ValueError(
                "Expected a loss that depends differentiably on the noise, but it carries no gradient. Remove "
                "`.detach()`, `.item()` and numpy from the objective, or use a method without gradients, such as "
                "`BestOfN`."
            )
        if step == 0 and not loss.detach().isfinite().all():
            raise NonFiniteReward(f"Expected a finite loss for the plain result, but got {loss.tolist()}.")

    def record(self, eligible: torch.Tensor | None = None) -> None:
        """Keep this step, as the best of the samples where it is, among those that are `eligible`, `(B,)` bool."""
        state = self.state
        assert state.loss is not None
        norm = per_sample_norm(state.noise) / math.sqrt(state.noise[0].numel())
        bands = band_energies(state.noise - self.problem.noise).where(state.active[:, None], torch.nan)
        self.rows.append(StepRow(loss=state.loss, norm=norm, bands=bands, scores=state.scores))
        if state.step == 0:
            self.initial_images = state.images
            state.best_loss = torch.full_like(state.loss, torch.inf)
            state.best_step = torch.zeros_like(state.loss, dtype=torch.long)
            state.best_noise, state.best_images = state.noise, state.images
        assert state.best_loss is not None and state.best_step is not None and state.best_noise is not None
        better = state.loss < state.best_loss  # strictly: of equals the first wins; false for NaN
        if eligible is not None and state.step > 0:
            better = better & eligible
        state.best_loss = torch.where(better, state.loss, state.best_loss)
        state.best_step = torch.where(better, state.step, state.best_step)
        state.best_noise = torch.where(per_image(better, state.noise), state.noise, state.best_noise)
        if state.images is not None and state.best_images is not None:
            state.best_images = torch.where(per_image(better, state.images), state.images, state.best_images)
        best = {"noise": state.best_noise, "step": state.best_step, "images": state.best_images}
        self.best = BestSoFar(steps=len(self.rows), **best)

    def move(self) -> None:
        """Take the gradient where the method wants one, and the method's step."""
        state, gradient = self.state, None
        if self.leaf.requires_grad:
            assert self.total is not None
            (gradient,) = torch.autograd.grad(self.total.sum(), self.leaf)
            finite = gradient.flatten(1).isfinite().all(1)
            gradient = gradient.nan_to_num(0, 0, 0) * per_image(finite, gradient)
            self.drop_samples(state.active & ~finite)
        self.total = None
        moved = self.method.step(state, gradient, self.memory).detach()
        state.noise = torch.where(per_image(state.active, moved), moved, state.noise)

    def finish(self) -> None:
        """Evaluate what the method still gives, of all samples: a callback may watch, but not keep it from being."""
        for noise in self.method.finish(self.state, self.objective, self.memory):
            self.state.noise, self.state.active = noise.detach(), torch.ones_like(self.state.active)
            self.evaluate(len(self.rows))

    @torch.no_grad()
    def redraw(self) -> None:
        """Where a tiny decoder stood in, draw the plain result and what is returned with the pipeline's own, and let
        the objective score them."""
        if self.problem.sampler.decoder is None or self.initial_images is None:
            return
        sampler, report = self.problem.sampler.with_own_decoder(), {}
        for name, noise in (("initial", self.problem.noise), ("best", self.returned())):
            sample = self.sample_of(sampler, noise.detach(), 0, None, self.method.preview)
            loss, scores = self.objective.evaluate(sample)
            self.redrawn[name] = sample.images
            report[f"{name}_scores"] = {name: values.tolist() for name, values in scores.items()}
            report[f"{name}_loss"] = loss.tolist()
        self.state.reports[FULL_DECODER] = report

    def returned(self) -> torch.Tensor:
        """The noise of the result `(B, C, H, W)`."""
        assert self.best is not None
        return self.state.noise if self.method.returns == "last" else self.best.noise

    def drop_samples(self, broken: torch.Tensor) -> None:
        """Stop the samples whose gradient is not finite; the others go on."""
        if broken.any():
            self.state.stop("non-finite gradient", broken)
            warnings.warn(
                f"The gradient of sample {broken.nonzero().flatten().tolist()} is not finite after step "
                f"{self.state.step}: it keeps its best noise so far.",
                stacklevel=2,
            )

    def give_up(self, why: str) -> None:
        """End the run with what it has."""
        self.state.stop("non-finite reward")
        warnings.warn(f"The run stops after step {self.state.step} and keeps the best so far: {why}", stacklevel=2)

    def saved_result(self) -> NoiseResult:
        """The result at the end, in its file if there is one."""
        result = self.result()
        if self.noise_file is not None:
            result.save(self.noise_file.path)
        return result

    def rescue(self, error: BaseException) -> None:
        """Give an exception what was found before it, and write that."""
        if self.best is None:
            return
        result = self.result()
        result.provenance["stopped"] = self.state.stopped or type(error).__name__
        vars(error)["noise_result"] = result
        if self.noise_file is not None:
            self.noise_file.write_if_possible(result)

    def result(self) -> NoiseResult:
        """What has been found up to now."""
        problem, state, best = self.problem, self.state, self.best
        assert best is not None
        rows, last, noise = self.rows[: best.steps], self.method.returns == "last", self.returned()
        last_images = state.images if state.noise is self.evaluated else None
        latents = problem.sampler.to_latents(problem.pipe, noise.to(problem.dtype))
        return NoiseResult(
            noise=noise.detach(),
            latents=latents.detach(),
            scores={name: torch.stack([row.scores[name] for row in rows]) for name in rows[0].scores},
            losses=torch.stack([row.loss for row in rows]),
            norms=torch.stack([row.norm for row in rows]),
            best_step=torch.full_like(best.step, best.steps - 1) if last else best.step,
            provenance={
                "method": type(self.method).__name__,
                "settings": self.method.settings(),
                **provenance_of(problem, self.objective, state),
                "steps": best.steps,
            },
            generator_states=problem.sampler.states_after_draw(),
            reports=dict(state.reports),
            initial_noise=problem.noise.detach(),
            band_changes=torch.stack([row.bands for row in rows]),
            images=self.redrawn.get("best", last_images if last else best.images),
            initial_images=self.redrawn.get("initial", self.initial_images),
        )


def chunk_size_of(method: NoiseOptimizer, problem: NoiseProblem) -> int | None:
    """How many images a method has in memory at a time; `None` for the whole batch.

    "auto" draws one image, and counts what its graph holds: with each checkpointing that may be taken, until the whole
    batch fits. Raises `ValueError` for a number, if the call cannot be taken apart.
    """
    setting, batch = method.chunk_size, len(problem.noise)
    if setting is None or batch == 1:
        return None
    try:
        one = problem.sampler.chunk([0])
    except ValueError:
        if setting != "auto":
            raise
        return None
    if isinstance(setting, int):
        return setting if setting < batch else None
    if method.gradient is None:
        return None
    size, checkpoints = None, problem.sampler.checkpoints
    checkpoints.settle()
    for policy in checkpoints.ladder:
        checkpoints.take(policy)
        with SavedBytes() as saved, torch.enable_grad():
            one.images(problem.noise[:1].detach().requires_grad_(), method.gradient, method.preview)
        size = fitting_chunk_size(batch, saved.peak, free_memory(problem.noise.device))
        if size is None:
            break
    return size


# pipelines/methods.py


METHODS: dict[str, type[NoiseOptimizer]] = {}


def register_noise_optimizer(name: str):
    """Class decorator: make a method known by name. The same class may come again, as it does when code is reloaded."""

    def register(cls):
        known = METHODS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"The method name {name!r} is taken by {known.__qualname__}.")
        METHODS[name] = cls
        return cls

    return register


def list_noise_optimizers() -> list[str]:
    """The names that `optimize_noise` takes."""
    return sorted(METHODS)


def call_settings(named: dict[str, Any], others: Mapping[str, Any] | None, argument: str) -> dict[str, Any]:
    """The settings of a method from a pipeline call: arguments that are not `None`, and a dict of others.

    Raises `ValueError` for a setting that is given both ways; `argument` is what the dict is called.
    """
    settings = {name: value for name, value in named.items() if value is not None}
    if twice := sorted(settings.keys() & (others or {}).keys()):
        raise ValueError(f"Expected each setting once, but got {twice} by argument and in `{argument}` too.")
    return {**settings, **(others or {})}


def as_noise_optimizer(method: Any, settings: dict[str, Any] | None = None) -> NoiseOptimizer:
    """A method by its name and settings, or a method as it is. Raises `ValueError` or `TypeError` otherwise."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"Unknown method {method!r}. Available: {', '.join(list_noise_optimizers())}.")
        return METHODS[method](**(settings or {}))
    if settings:
        raise ValueError("Expected `method_kwargs` only beside the name of a method, but got a method object as well.")
    if isinstance(method, type) or not hasattr(method, "run"):
        raise TypeError(
            f"Expected a method such as `ReNO(rewards=...)` or one of the names {list_noise_optimizers()}, but got "
            f"{method!r}."
        )
    return method


# pipelines/contrast.py


def attraction_gamma(size: int, tau: float) -> float:
    """γ at which the strongest attraction equals the strongest repulsion: `exp(1/(γτ)) = (size − 1)·exp(1/τ)`.

    CNO, https://arxiv.org/abs/2510.03813, closed form `1 / (τ·ln(size − 1) + 1)`: 0.878 for 5 images and τ = 0.1, and 1
    for two. A smaller γ attracts more.
    """
    return 1 / (tau * math.log(size - 1) + 1)


def pooled_directions(x0: torch.Tensor, window_size: int) -> torch.Tensor:
    """`(B, C, H, W)` to unit vectors along the channels of a pooled grid, `(B, C, P)` in float32 or better.

    Args:
        x0: Latents; `(B, 1, C, H, W)` as well.
        window_size: The grid has so many cells down and across, at most H and W: P of them.
    """
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32)).flatten(1, -3)
    down, across = (min(window_size, side) for side in x0.shape[-2:])
    return F.normalize(F.adaptive_avg_pool2d(x0, (down, across)).flatten(2), dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """InfoNCE of a set against its own reference, for each image; CNO, https://arxiv.org/abs/2510.03813.

    In every pooled cell, with `f` the cosine along the channels, image i is told from the others by

        −log( exp(f(i, refᵢ)/(γτ)) / (exp(f(i, refᵢ)/(γτ)) + Σ_{j≠i} exp(f(i, j)/τ)) ),

    a cross-entropy whose own logit is the attraction to its reference. The mean over the cells is the loss of image i,
    the mean over the images the loss of the paper. The gradient goes into both members of each pair.

    Attributes:
        tau: τ, above 0.
        gamma: γ, above 0, or "auto" for `attraction_gamma`.
        attraction: Whether the numerator counts; without it only the others are fled from.
        repulsion: Whether the denominator counts.
    """

    tau: float
    gamma: float | str
    attraction: bool
    repulsion: bool

    def __call__(self, directions: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """`(B, C, P)` unit vectors of one set, B >= 2, and of its reference, to the losses `(B,)`."""
        size = len(directions)
        gamma = attraction_gamma(size, self.tau) if self.gamma == "auto" else float(self.gamma)
        own = (directions * reference).sum(1) / (gamma * self.tau)
        loss = -own if self.attraction else torch.zeros_like(own)
        if self.repulsion:
            others = torch.einsum("icp,jcp->ipj", directions, directions) / self.tau
            diagonal = torch.eye(size, dtype=torch.bool, device=own.device)[:, None]
            logits = torch.where(diagonal, own[..., None] if self.attraction else -torch.inf, others)
            loss = loss + logits.logsumexp(-1)
        return loss.mean(1)


class ContrastiveObjective(Objective):
    """`ContrastiveLoss` of the x0 estimates of one model call, each group of images with the same prompt for itself.

    The first evaluation is the reference: it costs no model call of its own. An object serves one run.

    Args:
        loss: The loss of one set.
        window_size: The estimates are pooled to a grid of so many cells down and across, at most the latent's.
    """

    def __init__(self, loss: ContrastiveLoss, window_size: int) -> None:
        self.loss, self.window_size = loss, window_size
        self.reference: torch.Tensor | None = None

    def check_groups(self, groups: Sequence[int]) -> None:
        if alone := [group for group in set(groups) if groups.count(group) == 1]:
            raise ValueError(
                f"Expected at least 2 images of each prompt to contrast, but got 1 of prompt {min(alone)}: alone it "
                "has nothing to differ from. Pass `num_images_per_prompt=5`, say."
            )

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        directions = pooled_directions(sample.x0, self.window_size)
        if self.reference is None:
            self.reference = directions.detach()
        losses, similarities = directions.new_zeros(2, len(directions))
        for rows in sets(sample.groups):
            part = directions[rows]
            losses = losses.index_put((rows,), self.loss(part, self.reference[rows]))
            similarities[rows] = mean_similarity(part.detach())
        return losses, {"similarity": similarities}

    def describe(self) -> dict[str, float | int | str | bool]:
        return {**dataclasses.asdict(self.loss), "window_size": self.window_size}


def sets(groups: Sequence[int]) -> Iterator[torch.Tensor]:
    """The rows of each group."""
    labels = torch.tensor(groups)
    for group in sorted(set(groups)):
        yield (labels == group).nonzero().flatten()


def mean_similarity(directions: torch.Tensor) -> torch.Tensor:
    """`(B, C, P)` unit vectors to each image's mean cosine to the B − 1 others, `(B,)` in [-1, 1]."""
    cosines = torch.einsum("icp,jcp->ij", directions, directions) / directions.shape[-1]
    return (cosines.sum(1) - cosines.diagonal()) / (len(directions) - 1)


# pipelines/quality_guard.py


GUARD_REPORT = "quality guard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityGuard:
    """Takes an image back to its last good noise where a reward of it falls to a limit.

    The guard of It's Never Too Late, https://arxiv.org/abs/2601.00090, per image, for any reward: it need not be
    optimised, nor have a gradient. "sharpness" and "complexity" as guards answer blur and plain backgrounds, which the
    paper leaves open. Of several limits the lowest counts. An image that is at its limit to begin with is held at its
    plain noise.

    Args:
        reward: A name, Hub id or folder of a reward, or any callable `(images, prompts) -> (B,)`; the name of one that
            is optimised means that one.
        drop: The limit is so far below the plain image's reward, above 0 in its units. The paper's intention: 0.05 of
            HPSv2.1.
        keep: The limit is this share of the plain image's reward, in (0, 1), for rewards that are positive.
        threshold: The limit itself. The paper for FLUX.1-schnell: 0.31 of HPSv2.1.
        mode: "revert" goes on from the last good noise without momentum; "freeze" leaves the image there for good.

    Raises:
        ValueError: for settings that cannot work.
    """

    reward: Any
    drop: float | None = None
    keep: float | None = None
    threshold: float | None = None
    mode: Literal["revert", "freeze"] = "revert"

    def __post_init__(self) -> None:
        for name, low, high in (("drop", 0.0, math.inf), ("keep", 0.0, 1.0), ("threshold", -math.inf, math.inf)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and low < value < high):
                raise ValueError(f"Expected `{name}` of a guard to be a number in ({low}, {high}), but got {value!r}.")
        if self.drop is None and self.keep is None and self.threshold is None:
            raise ValueError(
                f"Expected a limit for the guard {self.reward!r}, but got none. Pass `drop`, `keep` or `threshold`, as "
                'in `guard={"hpsv2.1": 0.05}` or `guard={"sharpness": {"keep": 0.8}}`.'
            )
        if self.mode not in ("revert", "freeze"):
            raise ValueError(f'Expected `mode` of a guard to be "revert" or "freeze", but got {self.mode!r}.')

    def limits(self, initial: torch.Tensor) -> torch.Tensor:
        """The rewards `(B,)` of the plain images to the limit of each.

        Raises:
            ValueError: for a share of a reward that is negative.
        """
        if self.keep is not None and (initial < 0).any():
            raise ValueError(
                f"Expected rewards of 0 or more for a guard with `keep`, but the plain images have {initial.tolist()}. "
                "Use `drop` or `threshold`."
            )
        limits = torch.full_like(initial, torch.inf)
        if self.drop is not None:
            limits = limits.minimum(initial - self.drop)
        if self.keep is not None:
            limits = limits.minimum(initial * self.keep)
        return limits if self.threshold is None else limits.clamp(max=self.threshold)


def shares_reward(guard: QualityGuard, names: Sequence[str]) -> bool:
    """Whether a guard means one of the rewards that are optimised under these names, rather than one of its own."""
    return isinstance(guard.reward, str) and guard.reward in names


def as_guards(guard: Any) -> list[QualityGuard]:
    """What `guard=` takes as a list of guards.

    That is `None`, a `QualityGuard`, a list of them, or a dict of rewards to the drop, or to settings by name:
    `{"hpsv2.1": 0.05, "sharpness": {"keep": 0.8}}`.

    Raises:
        TypeError, ValueError: for anything else, and for settings that cannot work.
    """
    if guard is None:
        return []
    if isinstance(guard, Mapping):
        return [guard_from(reward, settings) for reward, settings in guard.items()]
    entries = guard if isinstance(guard, list | tuple) else [guard]
    for entry in entries:
        if not hasattr(entry, "limits"):  # of a Hub copy as well
            raise TypeError(
                f'Expected a guard such as `{{"hpsv2.1": 0.05}}` or `QualityGuard(reward=..., drop=0.05)`, but got '
                f"{entry!r}."
            )
    rewards = [entry.reward for entry in entries]
    if twice := [reward for index, reward in enumerate(rewards) if reward in rewards[:index]]:
        raise ValueError(
            f"Expected one guard for each reward, but got two for {twice[0]!r}. Of several limits of one guard the "
            "lowest counts."
        )
    return list(entries)


def guard_from(reward: Any, settings: Any) -> QualityGuard:
    known = [field.name for field in dataclasses.fields(QualityGuard) if field.name != "reward"]
    if not isinstance(settings, Mapping):
        return QualityGuard(reward=reward, drop=settings)
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"Expected settings of a guard out of {known}, but got {unknown}.")
    return QualityGuard(reward=reward, **settings)


class GuardedNoise:
    """The noises of a run under guards: which of them are good, and where each goes back to.

    Args:
        noise: `(B, C, H, W)`, the plain noises.

    Attributes:
        good: `(B,)` bool, whether the image that was looked at last is above its limits, or held.
        held: `(B,)` bool, frozen at the last good noise.
        last_good: `(B, C, H, W)`.
    """

    def __init__(self, noise: torch.Tensor) -> None:
        self.last_good = noise
        self.good = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
        self.held = ~self.good
        self.rejections = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
        self.limits: dict[str, torch.Tensor] = {}

    def look(self, state: NoiseState, guards: Mapping[str, QualityGuard]) -> None:
        """Compare the rewards of what was evaluated with their limits, which those of the plain images set.

        Args:
            state: The step.
            guards: Name of a reward in the scores to its guard.
        """
        if state.step == 0:
            self.limits = {name: guard.limits(state.scores[name]) for name, guard in guards.items()}
            self.held = self.fallen(state, guards)
            return
        fallen = self.fallen(state, guards) & ~self.held
        self.good = ~fallen
        freezing = {name: guard for name, guard in guards.items() if guard.mode == "freeze"}
        self.held = self.held | (fallen & self.fallen(state, freezing))
        self.rejections += fallen & state.active
        self.last_good = torch.where(per_image(self.good & ~self.held, state.noise), state.noise, self.last_good)

    def fallen(self, state: NoiseState, guards: Mapping[str, QualityGuard]) -> torch.Tensor:
        """`(B,)` bool: a reward is at its limit or below, or NaN."""
        found = torch.zeros_like(self.good)
        for name in guards:
            found |= ~(state.scores[name] > self.limits[name]).to(found.device)
        return found

    def report(self) -> dict[str, Any]:
        """Plain values, each a list with one entry for each image."""
        return {
            "limits": {name: limits.tolist() for name, limits in self.limits.items()},
            "rejections": self.rejections.tolist(),
            "held": self.held.tolist(),
        }


class GuardWarning(NoiseCallback):
    """Say so where a guard accepted no step at all, and the plain images are what is returned."""

    def on_run_end(self, state: NoiseState) -> None:
        kept = state.reports.get(GUARD_REPORT, {}).get("kept_plain", [])
        images = [index for index, plain in enumerate(kept) if plain]
        if images:
            warnings.warn(
                f"The quality guard accepted no step of the sets of images {images}: they stay the plain ones. Allow a "
                "larger drop, take a smaller learning rate, or give the guarded reward a weight.",
                stacklevel=2,
            )


# rewards/hinged_set_reward.py


class HingedSetReward(SetReward):
    """The value of another set reward, with its gradient only below `target`.

    So the gradient of `-weight * value` is that of the hinge `weight * max(0, target - value)`, the diversity term of
    It's Never Too Late, https://arxiv.org/abs/2601.00090, eq. 3, while the value that is reported stays what it is.

    Args:
        reward: Any set reward.
        target: τ_D, in its units.
    """

    def __init__(self, reward: SetReward, target: float) -> None:
        super().__init__(reward.features)
        self.reward, self.target = reward, float(target)
        self.name, self.range, self.default_features = reward.name, reward.range, reward.default_features

    def score(self, features: Tensor) -> Tensor:
        value = self.reward.score(features)
        return value.where(value < self.target, value.detach())

    def bounds(self, count: int) -> tuple[float, float] | None:
        return self.reward.bounds(count)


# pipelines/set_objective.py


class SetObjective(Objective):
    """`Σ λ_q·(1 − mean r) − Σ λ_div·v`, or with a hinge `Σ λ_div·max(0, τ_D − v)`, for each set of images of a prompt.

    Every image of a set has the loss of the set. An object serves one run.

    Args:
        diversity: The set rewards v with their weights λ_div.
        rewards: The rewards r with their weights λ_q, or `None`.
        guards: What is watched beside them; a guard whose reward is the name of one of `rewards` shares it.
        hinge: Name of a set reward to its τ_D.
        stop_at: Name of a set reward to the value at which the method ends a set; checked here, as hinges are.
        references: `(M, 3, H, W)` images in [0, 1] that belong to every set and are given, or their features as
            `diversity.known_features` makes them.
        prompts: Ask the rewards about these instead of the pipeline's.
        warm_up: So many evaluations at the beginning give no gradient of the rewards.
    """

    def __init__(
        self,
        diversity: SetRewardSum,
        rewards: RewardSum | None = None,
        guards: Sequence[QualityGuard] = (),
        hinge: Mapping[str, float] | None = None,
        stop_at: Mapping[str, float] | None = None,
        references: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        prompts: str | Sequence[str] | None = None,
        warm_up: int = 0,
    ) -> None:
        self.hinge, self.stop_at = dict(hinge or {}), dict(stop_at or {})
        self.diversity = hinged(diversity, self.hinge)
        self.quality = None if rewards is None else RewardObjective(rewards, prompts)
        self.guards, self.watched = self.shared_and_own(guards, prompts, diversity)
        self.references, self.prompts, self.warm_up = references, prompts, warm_up
        self.known: Mapping[str, torch.Tensor] | None = None
        if isinstance(references, Mapping):
            diversity.check_feature_names(references)
        self.evaluations = 0
        parts = (self.quality, self.watched)
        self.requires_prompt = any(part.requires_prompt for part in parts if part is not None)

    def shared_and_own(
        self, guards: Sequence[QualityGuard], prompts: Any, diversity: SetRewardSum
    ) -> tuple[dict[str, QualityGuard], RewardObjective | None]:
        """The guards by the name that their reward has in the scores, and the rewards that they alone need."""
        optimised = [] if self.quality is None else self.quality.rewards.names
        own = [guard for guard in guards if not shares_reward(guard, optimised)]
        named = {guard.reward: guard for guard in guards if guard not in own}
        if not own:
            return named, None
        device = next((each.device for each in diversity.feature_maps if each.device), None)  # pyright: ignore
        watched = RewardObjective(RewardSum([(guard.reward, 1.0) for guard in own], device=device), prompts)  # pyright: ignore
        names = [f"guard {name}" for name in watched.rewards.names]
        return {**named, **dict(zip(names, own, strict=True))}, watched

    @property
    def reference_count(self) -> int:
        """M."""
        given = self.references
        return 0 if given is None else len(given if isinstance(given, torch.Tensor) else next(iter(given.values())))

    def check_groups(self, groups: Sequence[int]) -> None:
        for group in sorted(set(groups)):
            count = groups.count(group) + self.reference_count
            if count < 2:
                raise ValueError(
                    f"Expected at least 2 images of each prompt, references included, but got 1 of prompt {group}: "
                    "alone it has nothing to differ from. Pass `num_images_per_prompt=4`, say, or `references`."
                )
            for argument, targets in (("hinge", self.hinge), ("stop_at", self.stop_at)):
                for name, target in targets.items():
                    check_reachable(self.diversity, name, target, count, argument)

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        for part, with_gradient in ((self.quality, gradient), (self.watched, False)):
            if part is not None:
                part.try_out(prompt, height, width, with_gradient)
        given = self.references
        if isinstance(given, torch.Tensor) and given.shape[1:] != (3, height, width):
            raise ValueError(
                f"Expected references of shape (M, 3, {height}, {width}), as the images are, but got "
                f"{tuple(given.shape)}. Resize them, or call the pipeline with their height and width."
            )

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images = sample.images
        quality, scores = self.quality_of(sample)
        losses = torch.zeros(len(images), device=images.device)
        values = {name: torch.zeros_like(losses) for name in self.diversity.names}
        for rows in sets(sample.groups):
            output = self.diversity(images[rows], self.known_references(), sample.chunk_size)
            loss = self.diversity_loss(output.components) - self.carrier(output.total) + quality[rows].mean()
            losses = losses.index_put((rows,), loss.to(losses))
            for name, value in output.components.items():
                values[name][rows] = value.to(losses)
        self.evaluations += 1
        return losses, {**scores, **values}

    def quality_of(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`Σ λ_q·(1 − r)` of each image, `(B,)`, and the scores of all rewards, those of guards included."""
        loss, scores = torch.zeros(len(sample.images), device=sample.images.device), {}
        if self.quality is not None:
            loss, scores = self.quality.evaluate(sample)
            loss = loss + sum(self.quality.rewards.weights.values())
            loss = loss.detach() if self.evaluations < self.warm_up else loss
        if self.watched is not None:
            prompts = sample.prompts if self.prompts is None else self.prompts
            with torch.no_grad():
                watched = self.watched.rewards(sample.images.detach(), prompts, chunk_size=sample.chunk_size)
            scores = {**scores, **{f"guard {name}": value for name, value in watched.components.items()}}
        return loss, scores

    def diversity_loss(self, components: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`Σ λ_div·(−v)`, or `Σ λ_div·max(0, τ_D − v)`: a scalar without a gradient."""
        weights = self.diversity.weights
        parts = [
            weights[name] * ((self.hinge[name] - value).clamp_min(0) if name in self.hinge else -value)
            for name, value in components.items()
        ]
        return torch.stack(parts).sum()

    @staticmethod
    def carrier(total: torch.Tensor) -> torch.Tensor:
        """Zero, with the gradient of `total`."""
        return total - total.detach()

    def known_references(self) -> Mapping[str, torch.Tensor] | None:
        """The features of the references, computed once."""
        if self.reference_count == 0:
            return None
        if self.known is None and isinstance(self.references, torch.Tensor):
            self.known = self.diversity.known_features(self.references)
        return self.references if isinstance(self.references, Mapping) else self.known

    def describe(self) -> dict[str, Any]:
        quality = None if self.quality is None else self.quality.describe()
        guards = {name: {**vars(guard), "reward": name} for name, guard in self.guards.items()}
        targets = {"hinge": self.hinge, "stop_at": self.stop_at}
        return {
            "diversity": self.diversity.describe(),
            "rewards": quality,
            "guards": guards,
            "references": self.reference_count,
            **{name: values for name, values in targets.items() if values},
        }


def hinged(diversity: SetRewardSum, hinge: Mapping[str, float]) -> SetRewardSum:
    """The same sum, with no gradient of a set reward beyond its τ_D."""
    if not hinge:
        return diversity
    entries = [
        (HingedSetReward(reward, hinge[name]) if name in hinge else reward, diversity.weights[name])  # pyright: ignore
        for name, reward in zip(diversity.names, diversity.rewards, strict=True)
    ]
    return SetRewardSum(entries)


def check_reachable(
    diversity: SetRewardSum, name: str, target: float, count: int, argument: str, unit: float = 1.0
) -> None:
    """Raise `ValueError` for a target, in multiples of `unit`, beyond what a set of `count` images can have."""
    reward: Any = diversity.rewards[diversity.names.index(name)]
    bounds = reward.bounds(count)
    if bounds is not None and target * unit > bounds[1]:
        most = f"{bounds[1]:.4g}" if unit == 1 else f"{bounds[1]:.4g}, where the plain set has {unit:.4g}"
        raise ValueError(
            f"Expected `{argument}` of '{name}' to be at most {bounds[1] / unit:.4g}, as {count} images have at most "
            f"{most}, but got {target:.4g}: it can never be reached."
        )


# pipelines/never_too_late.py


TARGETS = ("hinge", "stop_at", "stop_ratio")
NEVER_TOO_LATE_SIZE = 4 * 4 * 64 * 64  # entries of the set of noises that the paper's learning rates were chosen for
Targets = float | Mapping[str, float]


@register_noise_optimizer("never_too_late")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeverTooLate(NoiseOptimizer):
    """Gradient descent of a whole set of noises: the images of a prompt come to differ, and stay good.

    "It's Never Too Late: Noise Optimization for Collapse Recovery in Trained Diffusion Models", Harrington et al., CVPR
    2026, https://arxiv.org/abs/2601.00090.

    The images of each prompt in a call are a set with the loss `L = Σ λ_q·(1 − mean r) − Σ λ_div·v + λ_reg·mean χ`: r
    the rewards, v the set rewards, χ the prior of the norm of the noise. SGD with momentum moves all noises of the set,
    with one clip of their common gradient, and the noises of the lowest loss (without the prior) are returned, together
    as they were. Start from `noise_sampler="pink"` for more diversity.

    `mode="parity"` takes the steps of the released code; `mode="default"` takes them in units of √(entries of the set /
    65536), so that a learning rate suits any latent and set size, and lets saturated pixels keep their gradient. Where
    the released code is followed in neither: noise, momentum and norms are float32; a step in which the guard rejected
    an image does not count as the best, so noises and images always belong together; a guard needs no reward that is
    optimised; the rewards count for the best in the warm-up as well; a set ends as a whole.

    Args:
        diversity: What `SetRewardSum` takes, with the weights λ_div: a name ("dpp", "dpp_patch", "pairwise", "vendi",
            "vendi_2"), `{"dpp": 150.0}`, or on other features `{"dpp": ("clip", 150.0)}`.
        rewards: What `RewardSum` takes, with the weights λ_q, or `None`. The paper: `{"hpsv2.1": 3.0}`. All may have
            weight 0 if each is guarded.
        guard: Limits for each image: `{"hpsv2.1": 0.05}` allows a drop of so much from the plain image, `{"sharpness":
            {"keep": 0.8}}` four fifths of it; see `QualityGuard`. The reward need not be optimised.
        steps: Evaluations, the plain result included. The paper: 50 to 150.
        mode: "default" or "parity".
        learning_rate: At least 0.
        momentum: In [0, 1); not Nesterov's.
        max_grad_norm: The gradient of a set is clipped to this L2 norm; with the learning rate it sets the length of a
            step, and where it is active only ratios of the weights matter.
        regularization: λ_reg, at least 0.
        hinge: τ_D: the first form of the paper, `λ_div·max(0, τ_D − v)`, which goes on for the rewards once a set is
            diverse enough. A number for one set reward, or a dict by name.
        stop_at: End a set as soon as v is at least this, in the units of the set reward: 0.98 of "dpp" is the rule of
            the released code. A number for one set reward, or a dict by name, all of which must be reached.
        stop_ratio: The same as a multiple of the v of the plain set. Of both for one set reward the lower counts.
        warm_up: So many steps at the beginning leave the rewards out of the gradient.
        references: `(M, 3, H, W)` images in [0, 1] that belong to every set and are not moved, or their features as
            `SetRewardSum.known_features` gives them. One image of a prompt is enough then.
        reward_prompt: Ask the rewards about this instead of the pipeline's prompt: one, or one for each image.
        preview: Look at the x0 estimate of one model call instead of the whole chain.
        chunk_size: How many images are in memory with their graphs at a time: "auto", as many as fit; a number of 1 or
            more, the same gradient in constant memory for one more forward pass; or `None` for the whole batch.
        checkpointing: "auto", "none", "blocks" or "steps": see `NoiseOptimizer`.
        decoder: A tiny autoencoder that decodes while the noise is optimised: see `NoiseOptimizer`.
        reward_device: Where rewards and features that are given by name are loaded, by default where the pipeline is.
    """

    diversity: Any = (("dpp", 150.0),)
    rewards: Any = None
    guard: Any = None
    steps: int = 50
    mode: Literal["default", "parity"] = "default"
    learning_rate: float = 6.0
    momentum: float = 0.9
    max_grad_norm: float = 0.1
    regularization: float = 0.01
    hinge: Targets | None = None
    stop_at: Targets | None = None
    stop_ratio: Targets | None = None
    warm_up: int = 0
    references: torch.Tensor | Mapping[str, torch.Tensor] | None = None
    reward_prompt: str | Sequence[str] | None = None
    preview: bool = False
    chunk_size: ChunkSetting = "auto"
    checkpointing: Checkpointing = "auto"
    decoder: Any = None
    reward_device: str | torch.device | None = None

    @property
    def clamp(self) -> Clamp:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "hard" if self.mode == "parity" else "straight_through"

    def check(self) -> None:
        super().check()
        if self.mode not in ("default", "parity"):
            raise ValueError(f'Expected `mode` to be "default" or "parity", but got {self.mode!r}.')
        if not (0 <= self.learning_rate < math.inf and self.max_grad_norm > 0 and 0 <= self.momentum < 1):
            raise ValueError(
                "Expected a finite learning_rate >= 0, max_grad_norm > 0 and momentum in [0, 1), but got "
                f"{self.learning_rate}, {self.max_grad_norm} and {self.momentum}."
            )
        if not (isinstance(self.warm_up, int) and self.warm_up >= 0):
            raise ValueError(f"Expected `warm_up` to be an integer of 0 or more, but got {self.warm_up!r}.")
        ChiPrior(self.regularization)
        as_guards(self.guard)

    def objective(self, pipe) -> SetObjective:
        guards = as_guards(self.guard)
        weighted = optimised_rewards(self.rewards, guards)
        diversity = SetRewardSum(self.diversity, device=self.device_of_rewards(pipe))
        diversity.check_differentiable()
        if not any(diversity.weights.values()) and weighted is None:
            raise ValueError(
                "Expected a set reward with a weight above 0, or `rewards`, but got neither: there is nothing to do."
            )
        hinge, stop_at, _ = (targets_by_name(getattr(self, name), diversity, name) for name in TARGETS)
        return SetObjective(
            diversity,
            None if weighted is None else differentiable_rewards(weighted, self.device_of_rewards(pipe)),
            guards,
            hinge=hinge,
            stop_at=stop_at,
            references=self.references,
            prompts=self.reward_prompt,
            warm_up=self.warm_up,
        )

    def regularizer(self, noise: torch.Tensor) -> torch.Tensor:
        return ChiPrior(self.regularization)(noise)

    def watchers(self) -> list[NoiseCallback]:
        return [GuardWarning()] if as_guards(self.guard) else []

    def start(self, problem: NoiseProblem) -> "SetStanding":
        return SetStanding(problem)

    def inspect(self, state: NoiseState, objective: Any, memory: "SetStanding") -> torch.Tensor:
        """Ask the guard, end the sets that are diverse enough; the samples whose set is good throughout."""
        whole = memory.of_whole_sets(state.active)
        if (state.active & ~whole).any():
            state.stop("part of the set ended", ~whole)
        accepted = memory.look(state, objective.guards) & whole
        if state.step == 0:
            memory.targets = self.targets(state, objective, memory)
        memory.stop_reached(state, accepted)
        return accepted

    def targets(self, state: NoiseState, objective: Any, memory: "SetStanding") -> dict[str, torch.Tensor]:
        """Name of a set reward to the value `(B,)` at which a set ends. Raises `ValueError` for one out of reach."""
        found = {name: torch.full_like(state.scores[name], target) for name, target in objective.stop_at.items()}
        for name, ratio in targets_by_name(self.stop_ratio, objective.diversity, "stop_ratio").items():
            plain = state.scores[name]
            for rows in memory.rows:
                count = len(rows) + objective.reference_count
                check_reachable(objective.diversity, name, ratio, count, "stop_ratio", unit=plain[rows[0]].item())
            found[name] = found.get(name, torch.full_like(plain, torch.inf)).minimum(plain * ratio)
        return found

    def step(self, state: NoiseState, gradient: torch.Tensor, memory: "SetStanding") -> torch.Tensor:
        gradient = memory.clipped(gradient, self.max_grad_norm)
        guarded = memory.guarded
        stays = per_image(~guarded.good | guarded.held, gradient)
        memory.velocity = (self.momentum * memory.velocity + gradient).where(~stays, 0)
        moved = state.noise - self.learning_rate * per_image(self.scale(memory), gradient) * memory.velocity
        return torch.where(stays, guarded.last_good, moved)

    def scale(self, memory: "SetStanding") -> torch.Tensor:
        """`(B,)`: the unit of the learning rate for the set of each image."""
        if self.mode == "parity":
            return torch.ones_like(memory.sizes)
        return (memory.sizes * memory.velocity[0].numel() / NEVER_TOO_LATE_SIZE).sqrt()


class SetStanding:
    """What a run remembers of its sets.

    Attributes:
        rows: The samples of each set.
        sizes: `(B,)`, how many there are in the set of each sample.
        velocity: `(B, C, H, W)`, the momentum.
        guarded: The noises under the guard.
        targets: Name of a set reward to `(B,)`, the value at which a set ends.
        accepted_steps, rejected_steps: `(B,)`, of the set of each sample, by the guard, the first not counted.
    """

    def __init__(self, problem: NoiseProblem) -> None:
        noise = problem.noise
        self.rows = [rows.to(noise.device) for rows in sets(problem.groups)]
        self.sizes = torch.tensor([problem.groups.count(group) for group in problem.groups]).to(noise)
        self.velocity = torch.zeros_like(noise)
        self.guarded = GuardedNoise(noise)
        self.targets: dict[str, torch.Tensor] = {}
        self.accepted_steps = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
        self.rejected_steps = torch.zeros_like(self.accepted_steps)

    def look(self, state: NoiseState, guards: Mapping[str, Any]) -> torch.Tensor:
        """`(B,)` bool: all images of the set are good. Ends the sets whose images are all held."""
        self.guarded.look(state, guards)
        accepted = self.of_whole_sets(self.guarded.good)
        if guards:
            self.report(state, accepted)
            state.stop("guard holds all images", self.of_whole_sets(self.guarded.held))
        return accepted

    def report(self, state: NoiseState, accepted: torch.Tensor) -> None:
        """Keep what the guard did for the result."""
        if state.step > 0:
            self.accepted_steps += accepted & state.active
            self.rejected_steps += ~accepted & state.active
        stuck = (self.rejected_steps > 0) | self.of_whole_sets(self.guarded.held)
        state.reports[GUARD_REPORT] = {
            **self.guarded.report(),
            "accepted_steps": self.accepted_steps.tolist(),
            "kept_plain": (stuck & (self.accepted_steps == 0)).tolist(),
        }

    def stop_reached(self, state: NoiseState, accepted: torch.Tensor) -> None:
        """End the sets that have all targets, in a step that is accepted."""
        if self.targets:
            reached = torch.stack([state.scores[name] >= value for name, value in self.targets.items()]).all(0)
            state.stop("diversity reached", reached.to(accepted.device) & accepted)

    def of_whole_sets(self, flags: torch.Tensor) -> torch.Tensor:
        """`(B,)` bool to whether they hold for the whole set of each sample."""
        found = torch.zeros_like(flags)
        for rows in self.rows:
            found[rows] = flags[rows].all()
        return found

    def clipped(self, gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
        """The gradient of the sum over images to that of each set's loss, clipped by one norm for each set."""
        gradient = gradient / per_image(self.sizes, gradient)
        factors = torch.ones_like(self.sizes)
        for rows in self.rows:
            norm = per_sample_norm(gradient[rows].flatten()[None])[0]
            factors[rows] = (max_norm / (norm + 1e-6)).clamp(max=1).to(factors)
        return gradient * per_image(factors, gradient)


def optimised_rewards(rewards: Any, guards: Sequence[Any]) -> Any:
    """`rewards`, or `None` where all have weight 0 and are guarded: then the guards score them.

    Elsewhere `RewardSum` says what is wrong.
    """
    if rewards is None or any(weight for _, weight in reward_weight_pairs(rewards, None)):
        return rewards
    guarded = [guard.reward for guard in guards]
    return None if all(reward in guarded for reward, _ in reward_weight_pairs(rewards, None)) else rewards


def targets_by_name(targets: Targets | None, diversity: Any, argument: str) -> dict[str, float]:
    """Targets as name -> number. Raises `ValueError` for other names and for what is no number."""
    if targets is None:
        return {}
    names = list(diversity.names)
    if not isinstance(targets, Mapping) and len(names) > 1:
        raise ValueError(f"Expected `{argument}` by name for the set rewards {names}, but got {targets!r}.")
    named = dict(targets) if isinstance(targets, Mapping) else {names[0]: targets}
    if unknown := sorted(named.keys() - set(names)):
        raise ValueError(f"Expected `{argument}` of set rewards out of {names}, but got {unknown}.")
    for name, target in named.items():
        if not isinstance(target, int | float) or isinstance(target, bool) or not math.isfinite(target):
            raise ValueError(f"Expected `{argument}` of '{name}' to be a finite number, but got {target!r}.")
    return {name: float(target) for name, target in named.items()}


# pipelines/pipeline_code.py


DYNAMIC_MODULES = "diffusers_modules."  # where diffusers puts what it loaded by `custom_pipeline`


class SavedWithCode:
    """Makes `save_pretrained` and `push_to_hub` write the pipeline's `pipeline.py` and name it in `model_index.json`.

    Then `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads what was saved, and so does the class
    itself, which needs no trust as it runs none of that code.
    """

    _code: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the code of a class that was loaded from a file: diffusers puts the next one in the same place."""
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(DYNAMIC_MODULES):
            cls._code = Path(str(sys.modules[cls.__module__].__file__)).read_text(encoding="utf-8")

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """The stock method, which `save_pretrained` and `push_to_hub` call, with the code beside the configuration."""
        if has_code(type(self)):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / "pipeline.py").write_text(code_of(type(self)), encoding="utf-8", newline="\n")
        super().save_config(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def to_json_string(self) -> str:
        """The stock configuration, with the class named as one of `pipeline.py`."""
        text: str = super().to_json_string()  # pyright: ignore[reportAttributeAccessIssue]
        if not has_code(type(self)):
            return text
        named = json.loads(text) | {"_class_name": ["pipeline", type(self).__name__]}
        return json.dumps(named, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """The configuration in a file, for a class that is at hand and needs no code to be loaded."""
        index = super()._dict_from_json_file(json_file)  # pyright: ignore[reportAttributeAccessIssue]
        return index | ({"_class_name": cls.__name__} if isinstance(index.get("_class_name"), list) else {})


def has_code(cls: type) -> bool:
    """Whether a class was loaded from a file or can be imported, unlike one of a script or a notebook."""
    importable = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls and cls.__module__ != "__main__"
    return "_code" in vars(cls) or importable


def code_of(cls: type) -> str:
    """The source of a file that has a class which `has_code`.

    That of the file that it was loaded from, else a self-contained file for a class of this package, and for another an
    import of it from where it is installed.
    """
    if "_code" in vars(cls):
        return vars(cls)["_code"]
    if cls.__module__.startswith("noiseopt.pipelines."):  # what bundles its modules is no part of a bundle
        return importlib.import_module("noiseopt.hub.build").code_of_pipeline(cls)
    name, package = cls.__name__, cls.__module__.split(".")[0]
    return f'"""{name} of the package {package}, which has to be installed."""\n\nfrom {cls.__module__} import {name}\n'


# pipelines/noise_hook.py


class NoiseFound(Exception):
    """Ends a pipeline call once its noise is known, when nobody asked for the final image."""


class NoiseDraw:
    """One pipeline call on noise of a sampler, and nothing optimised."""

    def __init__(self, request: dict[str, Any], noise_sampler: NoiseSamplerSpec | None) -> None:
        prompts_of(request, required=False)
        self.noise_sampler = noise_sampler_of(noise_sampler, request, groups_of(request))

    def encode_prompt(self, encode, *args, **kwargs):
        return encode(*args, **kwargs)

    def prepare_latents(self, pipe, *args, **kwargs):
        """The hook: the stock method, on noise of the sampler."""
        space = LatentSpace(pipe, args, kwargs, self.noise_sampler)
        return space.on(pipe, space.draw_noise)


class NoiseRun:
    """One pipeline call under optimisation: what it was asked for, encoded, and found."""

    def __init__(
        self,
        pipe,
        method: NoiseOptimizer,
        request: dict[str, Any],
        callbacks: CallbackSpec | Iterable[CallbackSpec] | None,
        render: bool = True,
        noise_sampler: NoiseSamplerSpec | None = None,
        save_noise_to: str | os.PathLike[str] | None = None,
    ) -> None:
        self.method, self.request, self.render = method, request, render
        self.callbacks = as_callbacks(callbacks)
        method.check()
        check_class(pipe, request)
        if torch.is_inference_mode_enabled():
            raise ValueError("Expected a call outside `torch.inference_mode()`, where no gradient exists. Remove it.")
        refuse_unsuited(pipe, method.gradient)
        self.objective: Objective = method.objective(pipe)
        self.prompts = prompts_of(request, self.objective.requires_prompt)
        self.groups = groups_of(request)
        self.objective.check_groups(self.groups)
        check_latents(request, len(self.prompts))
        self.noise_sampler = noise_sampler_of(noise_sampler, request, self.groups)
        self.noise_file = None if save_noise_to is None else NoiseFile(save_noise_to)
        if size := image_size(pipe, request):
            self.objective.try_out(self.prompts[0], *size, gradient=method.gradient is not None)
        self.decoder = as_loop_decoder(method.decoder, pipe, list(parts_of(pipe, DENOISERS).values()))
        self.encoded: list[Any] = []
        self.result: NoiseResult | None = None

    def encode_prompt(self, encode, *args, **kwargs):
        """Record what the stock method returns, for the inner runs."""
        self.encoded.append(encode(*args, **kwargs))
        return self.encoded[-1]

    def prepare_latents(self, pipe, *args, **kwargs):
        """The hook: draw the base noise as the stock method does, optimise it, prepare the result."""
        space = LatentSpace(pipe, args, kwargs, self.noise_sampler)
        device = torch.device(space.arguments.get("device") or pipe._execution_device)
        random_state = RandomState(self.request.get("generator"), device)
        noise, drew = space.draw(pipe)
        sampler = PipelineSampler(
            pipe,
            self.request,
            self.encoded,
            space,
            random_state,
            drew,
            clamp=self.method.clamp,
            decoder=self.decoder,
            checkpointing=self.method.checkpointing,
            through_denoiser=self.method.gradient == "full",
        )
        master = noise.detach().to(torch.promote_types(noise.dtype, torch.float32))
        prompts, groups = self.prompts, self.groups
        problem = NoiseProblem(pipe, sampler, space, master, prompts, groups, noise.dtype, self.request)
        with torch.enable_grad(), sampler.checkpoints:
            self.result = self.method.run(problem, self.objective, self.callbacks, self.noise_file)
        if not self.render:
            raise NoiseFound
        return sampler.prepare(pipe, self.result.noise.to(noise.dtype))


def check_class(pipe, request: dict[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` for a pipeline whose noise cannot be had in this call."""
    parameters = inspect.signature(drawing_function(type(pipe))(randn_tensor)).parameters
    if request.get("latents") is not None and "latents" not in parameters:
        raise latents_with_image(pipe)


def check_latents_taken(pipe) -> None:
    """Raise `TypeError` for a pipeline that cannot draw a noise again."""
    if "latents" not in inspect.signature(stock_call(type(pipe))).parameters:
        name = type(pipe).__name__
        raise TypeError(
            f"Expected a pipeline that takes `latents`, to draw the noise that was found, but {name} takes none. Give "
            f"it the hook, `class Ours(NoiseOptimizationMixin, {name})`, and call that with `noise_optimizer=...`: it "
            "draws the image in the same call."
        )


def prompts_of(request: dict[str, Any], required: bool) -> list[str]:
    """The prompt of each image, in the order in which pipelines lay them out."""
    prompt, embeds = request.get("prompt"), request.get("prompt_embeds")
    if prompt is None and embeds is None:
        raise ValueError("Expected `prompt` or `prompt_embeds`, but got neither.")
    if prompt is None and required:
        raise ValueError(
            "Expected the text of the prompt for the rewards, but got `prompt_embeds` only. Name it in the method: "
            "`ReNO(..., reward_prompt=...)`."
        )
    if prompt is None:
        prompt = [""] * len(embeds)  # pyright: ignore[reportArgumentType]
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return [text for text in texts for _ in range(request.get("num_images_per_prompt") or 1)]


def groups_of(request: dict[str, Any]) -> list[int]:
    """For each image the index of the first prompt, or the first embedding, that equals its own."""
    prompt, embeds = request.get("prompt"), request.get("prompt_embeds")
    if prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        first = [texts.index(text) for text in texts]
    else:
        rows = list(embeds)  # pyright: ignore[reportArgumentType]
        first = [next(i for i, other in enumerate(rows) if torch.equal(row, other)) for row in rows]
    return [group for group in first for _ in range(request.get("num_images_per_prompt") or 1)]


def check_latents(request: dict[str, Any], batch: int) -> None:
    latents, generator = request.get("latents"), request.get("generator")
    if latents is not None and len(latents) != batch:
        raise ValueError(
            f"Expected `latents` for {batch} images (prompts × `num_images_per_prompt`), but got {len(latents)}."
        )
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"Expected one generator for each of {batch} images, but got {len(generator)}.")


def noise_sampler_of(
    noise_sampler: NoiseSamplerSpec | None, request: dict[str, Any], groups: list[int]
) -> Callable[..., torch.Tensor] | None:
    """The noise sampler of a call, coupled where it couples: among the images of a prompt.

    Raises `ValueError` beside `latents`, where there is nothing to draw.
    """
    found = as_noise_sampler(noise_sampler)
    if found is None:
        return None
    if request.get("latents") is not None:
        raise ValueError(
            "Expected `noise_sampler` or `latents`, but got both. Given latents are taken as they are: leave one out."
        )
    return found.within(groups) if hasattr(found, "within") else found  # pyright: ignore[reportFunctionMemberAccess]


def image_size(pipe, request: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the images in pixels, if they can be told before the call."""
    if request.get("height") and request.get("width"):
        return request["height"], request["width"]
    if request.get("image") is not None:
        return size_of_image(pipe, request["image"])
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    side = getattr(pipe, "default_sample_size", None) or getattr(getattr(denoiser, "config", None), "sample_size", None)
    scale = getattr(pipe, "vae_scale_factor", None)
    return (side * scale, side * scale) if isinstance(side, int) and isinstance(scale, int) else None


def size_of_image(pipe, image: Any) -> tuple[int, int] | None:
    """Height and width that a pipeline makes of a given image, or of the first of several."""
    image = image[0] if isinstance(image, list) else image
    size_of = getattr(getattr(pipe, "image_processor", None), "get_default_height_width", None)
    is_latents = isinstance(image, torch.Tensor) and image.shape[-3] != 3
    return None if size_of is None or is_latents else size_of(image)


class NoiseOptimizationMixin(SavedWithCode):
    """Gives any diffusers text-to-image pipeline an optimisation hook in `prepare_latents`.

    `class ReNOTurboPipeline(NoiseOptimizationMixin, StableDiffusionXLPipeline)` is all that a pipeline needs. With
    `noise_optimizer=None` and no `noise_sampler` every call goes straight to the stock class, bit-identical to it.

    The stock `__call__` runs once as it is. When it reaches `prepare_latents`, its prompts are encoded; there the noise
    is optimised, each evaluation being the same stock `__call__` on a shallow twin (see `PipelineSampler`). Then the
    call goes on with the noise that was found: only this final run fires `callback_on_step_end`.
    """

    _noise_run: NoiseRun | NoiseDraw | None = None

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """The stock method; unless `dtype` is given, the modules that both pipelines share keep theirs.

        The stock method converts them to float32 then, in the pipeline that they came from too.
        """
        if kwargs.keys() & {"dtype", "torch_dtype", "custom_pipeline"}:
            return super().from_pipe(pipeline, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        as_they_are = {"to": lambda pipe, *_, **__: pipe, "__module__": cls.__module__}
        unconverted = type(cls.__name__, (cls,), as_they_are)
        made = super(NoiseOptimizationMixin, unconverted).from_pipe(pipeline, **kwargs)  # pyright: ignore
        made.__class__ = cls
        return made

    def __call__(
        self,
        *args,
        noise_optimizer: NoiseOptimizer | None = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        callback_on_optimization_step_end: CallbackSpec | Iterable[CallbackSpec] | None = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        **kwargs,
    ):
        """The stock call, with the initial noise optimised first if `noise_optimizer` is given.

        Args:
            noise_optimizer: A method, such as `ReNO(rewards={"clipscore": 1.0})`.
            noise_sampler: What the initial noise is drawn from, optimised or not: `"white"`, as in the stock pipeline,
                `"pink"`, `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, or a function `(shape,
                generator, device, dtype)` that returns noise of unit variance. Not beside `latents`.
            callback_on_optimization_step_end: Callbacks per optimisation step; see `NoiseCallback`.
            save_noise_to: A file for the best noise so far, kept up to date and whole whatever ends the call; see
                `optimize_noise`.
            args, kwargs: Those of the stock pipeline.

        Returns:
            What the stock pipeline returns; unless `return_dict=False` with a `noise_result` attribute. An exception on
            the way, Ctrl-C among them, carries the best so far as its `noise_result`.
        """
        stock = super().__call__  # pyright: ignore[reportAttributeAccessIssue]
        if noise_optimizer is None and save_noise_to is not None:
            raise ValueError(
                "Expected something to optimise beside `save_noise_to`, but got nothing: no noise would be found. "
                "Leave it out, or pass what the noise is to be optimised for."
            )
        if noise_optimizer is None and noise_sampler is None:
            return stock(*args, **kwargs)
        request = bind_request(self, args, kwargs)
        if noise_optimizer is None:
            with hook_on(self, NoiseDraw(request, noise_sampler)):
                return stock(*args, **kwargs)
        callbacks = callback_on_optimization_step_end
        own = {"noise_sampler": noise_sampler, "save_noise_to": save_noise_to}
        run = NoiseRun(self, noise_optimizer, request, callbacks, **own)
        try:
            with frozen_modules(self, run.decoder), hook_on(self, run):
                output = stock(*args, **kwargs)
        except BaseException as error:
            if run.result is not None:
                vars(error)["noise_result"] = run.result
            raise
        result = found_by(run, self)
        if not isinstance(output, tuple):
            output.noise_result = result
        return output

    def encode_prompt(self, *args, **kwargs):
        """The stock method; under optimisation its results are kept for the inner runs."""
        encode = super().encode_prompt  # pyright: ignore[reportAttributeAccessIssue]
        run = self._noise_run
        return encode(*args, **kwargs) if run is None else run.encode_prompt(encode, *args, **kwargs)

    def prepare_latents(self, *args, **kwargs):
        """The stock method, or under optimisation the hook: its noise is optimised before it is handed on."""
        run = self._noise_run
        if run is None:
            return super().prepare_latents(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return run.prepare_latents(self, *args, **kwargs)


def found_by(run: NoiseRun, pipe) -> NoiseResult:
    """The result of a call that is over."""
    if run.result is None:
        raise TypeError(
            f"Expected a call that prepares its latents by `prepare_latents`, but that of {type(pipe).__name__} did "
            "not, and nothing was optimised. Leave out the argument that takes the place of the noise."
        )
    return run.result


@contextlib.contextmanager
def hook_on(pipe, run: NoiseRun | NoiseDraw) -> Iterator[None]:
    """Let a run have the prompts and latents of a pipeline's call."""
    with undoing(lambda: vars(pipe).pop("_noise_run", None)):
        vars(pipe)["_noise_run"] = run
        yield


def bind_request(pipe, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a stock call by name. Raises `TypeError` for an unknown one."""
    bound = dict(inspect.signature(stock_call(type(pipe))).bind(pipe, *args, **kwargs).arguments)
    extra = bound.pop("kwargs", {})
    return {name: value for name, value in {**bound, **extra}.items() if name != "self"}


@functools.cache
def hooked(cls: type) -> type:
    """A subclass of a pipeline class with the hook, unless it has one."""
    if hasattr(cls, "_noise_run"):
        return cls
    return type(cls.__name__, (NoiseOptimizationMixin, cls), {"__module__": cls.__module__})


def optimize_noise(
    pipe,
    prompt: str | list[str] | None,
    method: NoiseOptimizer | str,
    *,
    method_kwargs: dict[str, Any] | None = None,
    callbacks: CallbackSpec | Iterable[CallbackSpec] | None = None,
    noise_sampler: NoiseSamplerSpec | None = None,
    save_noise_to: str | os.PathLike[str] | None = None,
    **call_kwargs,
) -> NoiseResult:
    """Find the initial noise of a call to any diffusers text-to-image pipeline, which stays as it is.

    Args:
        pipe: A loaded pipeline of any family whose `prepare_latents` draws Gaussian noise.
        prompt: As in the pipeline's call. Each image is a problem of its own.
        method: Such as `ReNO(rewards={"pickscore": 1.0})`, or a name of `list_noise_optimizers()`.
        method_kwargs: The settings of a method given by name.
        callbacks: Per optimisation step; see `NoiseCallback`.
        noise_sampler: What noise is drawn from, that of candidates too: `"white"`, as in the pipeline itself, `"pink"`,
            `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, `PinkNoise(0.3)`, or any function `(shape,
            generator, device, dtype)` that returns noise of unit variance. Not beside `latents`.
        save_noise_to: A file for the best noise so far, for `NoiseResult.load`: there from the first step on, brought
            up to date every few seconds, when the run ends and when an exception or Ctrl-C ends it; always whole. One
            that is there already is replaced.
        call_kwargs: What `pipe(prompt, ...)` takes: steps, guidance, size, generator, latents ...

    Returns:
        The result; `pipe(prompt, latents=result.latents, **call_kwargs)` draws it. An exception on the way, Ctrl-C
        among them, leaves the pipeline as it was, and carries the best so far as its `noise_result`.

    Raises:
        ValueError: Before any model runs, for settings or a pipeline state that cannot work.
        TypeError: For an argument that the pipeline does not take, or a pipeline without a noise to optimise.
    """
    optimizer = as_noise_optimizer(method, method_kwargs)
    twin = copy.copy(pipe)
    twin.__class__ = hooked(type(pipe))
    vars(twin)["scheduler"] = copy.deepcopy(pipe.scheduler)  # a call sets the timesteps of its scheduler
    check_latents_taken(twin)
    request = bind_request(twin, (), {"prompt": prompt, **call_kwargs})
    own = {"noise_sampler": noise_sampler, "save_noise_to": save_noise_to}
    run = NoiseRun(twin, optimizer, request, callbacks, render=False, **own)
    vars(twin)["_noise_run"] = run
    with frozen_modules(twin, run.decoder), torch.no_grad(), contextlib.suppress(NoiseFound):
        stock_call(type(pipe))(twin, **request)
    return found_by(run, twin)


# pipelines/plain_sampling.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainSampling(NoiseOptimizer):
    """Takes the noise as it is drawn; runs no denoiser. Its result has one loss of 0 and no scores."""

    steps: int = 1
    gradient: Gradient = None

    def objective(self, pipe) -> Objective:
        return FunctionObjective(lambda sample: torch.zeros(len(sample.noise), device=sample.noise.device))


# pipelines/image_set.py


OF_THE_SET = ("prompt", "latents", "generator", "num_images_per_prompt", "output_type", "return_dict")
OF_THE_NOISE = ("height", "width")
Seeds = int | Sequence[int] | torch.Generator | None


@dataclasses.dataclass(eq=False, repr=False)
class ImageSet:
    """What `grow_set` returns: `N` images of one prompt, each optimised to differ from those before it.

    Attributes:
        prompt: What all of them show.
        settings: What they were made with, in plain values: method, arguments of the call, noise sampler, model.
        seeds: `N` seeds, of the noise of each image.
        pictures: `N` PIL images, as the pipeline draws them.
        results: `N` results on the CPU, without their images. That of an image that was not optimised, as the first is
            not, holds its noise and provenance, one loss of 0 and no scores.
        values: A table with a row for each image. `"dpp"` (the name of each set reward) is its value once the image had
            joined, that of the union of all so far as they are shown; `"plain dpp"` what it would have been with the
            plain noise of the image, drawn as in the optimisation. `None` for an image that has none before it.
    """

    prompt: str
    settings: dict[str, Any]
    seeds: list[int] = dataclasses.field(default_factory=list)
    pictures: list[Image.Image] = dataclasses.field(default_factory=list)
    results: list[NoiseResult] = dataclasses.field(default_factory=list)
    values: list[dict[str, float | None]] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pictures)

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {value:.4g}" for name, value in (self.values or [{}])[-1].items() if value)
        return f"ImageSet({len(self)} images of {self.prompt!r}{': ' if last else ''}{last})"

    @property
    def images(self) -> torch.Tensor:
        """`(N, 3, H, W)` in [0, 1], float32 on the CPU, in 255ths: as shown and as saved. Of no image at least."""
        if not self.pictures:
            return torch.zeros(0, 3, 0, 0)
        return torch.cat([pixels_of(picture) for picture in self.pictures])

    def write_first(self, count: int, home: ImageSetFolder) -> None:
        """Add the last of the first `count` images to a folder that has those before it."""
        if count:
            home.write_image(count - 1, self.pictures[count - 1], self.results[count - 1])
        rows = {"seeds": self.seeds[:count], "values": self.values[:count]}
        home.write_record({"prompt": self.prompt, "settings": self.settings, **rows})

    def save(self, folder: str | Path) -> None:
        """Write `image_set.json`, and for each image `image_000.png` and its noise `image_000.safetensors`.

        Raises:
            ValueError: For a file, and a folder that has a set.
        """
        home = ImageSetFolder(folder)
        home.check_free()
        for count in range(len(self) + 1):
            self.write_first(count, home)

    @classmethod
    def load(cls, folder: str | Path) -> "ImageSet":
        """Read what `save` or `grow_set` wrote; nothing is unpickled.

        Raises:
            ValueError: For anything else, naming the file.
        """
        home = ImageSetFolder(folder)
        record = home.read_record()
        pictures = [home.read_picture(index) for index in range(len(record["seeds"]))]
        results = [home.read_result(index, seed) for index, seed in enumerate(record["seeds"])]
        shapes = {(picture.size, result.noise.shape) for picture, result in zip(pictures, results, strict=True)}
        if len(shapes) > 1:
            raise home.refusal(home.path, f"its images and noises are not of one size: {sorted(shapes)}")
        return cls(**record, pictures=pictures, results=results)

    def check_agrees(self, prompt: str, settings: Mapping[str, Any], folder: str | Path) -> None:
        """Raise `ValueError` unless the set was made from this prompt with these settings, naming what differs."""
        known = {"prompt": self.prompt, **self.settings}
        if changed := differences(known, {"prompt": prompt, **settings}):
            raise ValueError(
                f"Expected what the set in {folder} was grown with, but got other settings: {'; '.join(changed)}. Pass "
                "the same, or choose another folder."
            )


def grow_set(
    pipe,
    prompt: str,
    count: int,
    method: NoiseOptimizer | str | None = None,
    *,
    method_kwargs: dict[str, Any] | None = None,
    render: Mapping[str, Any] | None = None,
    generator: Seeds = None,
    noise_sampler: NoiseSamplerSpec | None = None,
    folder: str | Path | None = None,
    callbacks: CallbackSpec | Iterable[CallbackSpec] | None = None,
    **call_kwargs,
) -> ImageSet:
    """Grow a set of images of any size: each new one is optimised to differ from all before it.

    The sequential mode of It's Never Too Late, https://arxiv.org/abs/2601.00090. The first image is the plain one. Each
    further noise is optimised alone, with the value of the union of its image and all before it, whose features are
    kept: the device holds one image's graph and the features, however large the set is. Then the image is drawn,
    and the features of what was drawn join. What is optimised, its stop rule and callbacks are per image.

    Args:
        pipe: Any loaded text-to-image pipeline; it stays as it is.
        prompt: One.
        count: Images in all, at least 1.
        method: A method with `diversity` and `references`, which are then those of the set as well (and then the first
            image is optimised too), or its name. By default `NeverTooLate` on `{"dpp": 15.0}` with the paper's settings
            for this mode: 25 steps, learning rate 3, clip 0.15, stopped at 0.98; the paper adds `{"hpsv2.1": 1.0}`.
        method_kwargs: The settings of a method given by name.
        render: Arguments of the call that differ where an image is drawn for the set: with `{"num_inference_steps": 4}`
            one step finds the noise and four draw it.
        generator: The seed s, from which image k gets s + k, or one for each image; or a generator for its seed and
            device. Without, the first is drawn at random. A set that is resumed without seeds goes on by 1.
        noise_sampler: What noise is drawn from, one image at a time: `"white"`, `"pink"` ...; see `optimize_noise`.
        folder: Where each image is written as soon as it is there. If a set is there already, it is continued up to
            `count` images, and is the same then as one that was never interrupted. One with `count` or more is
            returned as it is.
        callbacks: Per optimisation step of each image; see `NoiseCallback`.
        call_kwargs: What `pipe(prompt, ...)` takes: steps, guidance, size ...

    Returns:
        The set. An exception on the way carries what there is of it as its `image_set`.

    Raises:
        ValueError: For settings that cannot work, and a folder that is broken or of a set with other settings.
        TypeError: For a method without references, or an argument that the pipeline does not take.
    """
    check_count_and_prompt(count, prompt)
    call = SetCall(pipe, prompt, call_kwargs, dict(render or {}), noise_sampler, seed_device(generator))
    growth = SetGrowth(call, sequential_method(method, method_kwargs), callbacks)
    home = None if folder is None else ImageSetFolder(folder)
    found = ImageSet(prompt, growth.settings())
    if home is not None:
        found = begun_set(home, found)
    seeds = further_seeds(generator, count, found.seeds)
    if home is not None and not home.begun:
        found.write_first(0, home)
    if seeds:
        growth.take_up(found)
    try:
        for seed in seeds:
            growth.add_image(found, seed)
            if home is not None:
                found.write_first(len(found), home)
    except BaseException as error:
        for rows in (found.seeds, found.results, found.values):
            del rows[len(found) :]  # of an image that Ctrl-C kept from joining
        vars(error)["image_set"] = found
        raise
    return found


@dataclasses.dataclass
class SetCall:
    """The call that draws the images of a set, one at a time.

    Attributes:
        pipe: The pipeline.
        prompt: That of all images.
        arguments: Of the call, in which a noise is optimised.
        render: Those that differ where an image is drawn for the set.
        noise_sampler: What noise is drawn from.
        device: Where its generators are.

    Raises:
        ValueError: For arguments that belong to the set, and a noise sampler that cannot draw one image.
        TypeError: For arguments that the pipeline does not take.
    """

    pipe: Any
    prompt: str
    arguments: dict[str, Any]
    render: dict[str, Any]
    noise_sampler: Any
    device: str

    def __post_init__(self) -> None:
        check_not_given(self.arguments, OF_THE_SET, "the arguments of the call")
        check_not_given(self.render, OF_THE_SET + OF_THE_NOISE, "`render`")
        bind_request(self.pipe, (), {"prompt": self.prompt, **self.arguments, **self.render})
        self.noise_sampler = single_noise_sampler(self.noise_sampler)

    def find(self, method: NoiseOptimizer, seed: int, callbacks: Any = None) -> NoiseResult:
        """The noise of one image."""
        generator = torch.Generator(self.device).manual_seed(seed)
        own = {"callbacks": callbacks, "noise_sampler": self.noise_sampler, "generator": generator}
        return optimize_noise(self.pipe, self.prompt, method, **own, **self.arguments)

    def draw(self, result: NoiseResult) -> Image.Image:
        """The image of a noise, as the pipeline shows it."""
        own = {"latents": result.latents, "generator": result.generator()}
        return self.pipe(prompt=self.prompt, **own, **{**self.arguments, **self.render}).images[0].convert("RGB")

    def settings(self) -> dict[str, Any]:
        pipe, scheduler = self.pipe, self.pipe.scheduler
        return {
            "arguments": plain_description(self.arguments),
            "render": plain_description(self.render),
            "noise_sampler": plain_description(describe_noise_sampler(self.noise_sampler)),
            "generator_device": self.device,
            "model": str(pipe.config.get("_name_or_path") or "") or None,
            "revision": revision_of(pipe),
            "scheduler": {"class": type(scheduler).__name__, **plain(dict(scheduler.config))},
            "dtype": str(pipe.dtype).removeprefix("torch."),
        }


class SetGrowth:
    """A set in the making: its method, with all that has a name loaded once, and the features of its images so far.

    Raises:
        TypeError, ValueError: For a method that cannot grow a set.
    """

    def __init__(self, call: SetCall, method: NoiseOptimizer, callbacks: Any) -> None:
        self.call, self.callbacks = call, callbacks
        device = method.device_of_rewards(call.pipe)
        self.diversity = SetRewardSum(method.diversity, device=device)  # pyright: ignore
        self.method: Any = with_loaded_parts(method, self.diversity, device)
        self.method.check()
        self.method.objective(call.pipe)
        self.known: dict[str, torch.Tensor] | None = None
        if (given := self.method.references) is not None:
            self.join(self.diversity.known_features(given) if isinstance(given, torch.Tensor) else given)

    def settings(self) -> dict[str, Any]:
        """What must be the same for a set to be continued, as JSON gives it back."""
        method = {field.name: getattr(self.method, field.name) for field in dataclasses.fields(self.method)}
        named = {"name": type(self.method).__name__, **plain_description(method)}
        return json.loads(json.dumps({"method": named, **self.call.settings()}))

    def take_up(self, found: ImageSet) -> None:
        """Encode the images of a set. Raises `ValueError` where its values are not those that it was saved with."""
        for index, picture in enumerate(found.pictures):
            values, features = self.values(picture)
            for name, value in values.items():
                saved = found.values[index].get(name)
                if value is not None and not (
                    isinstance(saved, float) and abs(saved - value) <= 1e-2 * max(1.0, abs(value))
                ):
                    raise ValueError(
                        f"Expected '{name}' to be {saved} at image {index} of the set, as it was saved, but got "
                        f"{value}. Pass the features that the set was grown with, or grow it again elsewhere."
                    )
            self.join(features)

    def add_image(self, found: ImageSet, seed: int) -> None:
        """Find the noise of one more image, draw it, and let it join."""
        method, callbacks = PlainSampling(), None
        if self.known is not None:
            method, callbacks = dataclasses.replace(self.method, references=self.known), self.callbacks
        result = self.call.find(method, seed, callbacks)
        picture = self.call.draw(result)
        values, features = self.values(picture)
        plain_scores = plain_scores_of(result) if self.known is not None else {}
        plain_values = {f"plain {name}": item_or_none(plain_scores.get(name)) for name in values}
        self.join(features)
        found.seeds.append(seed)
        found.results.append(without_images(result))
        found.values.append({**values, **plain_values})
        found.pictures.append(picture)

    def values(self, picture: Image.Image) -> tuple[dict[str, float | None], dict[str, torch.Tensor]]:
        """The value of each set reward with one more image, and the features of that image."""
        features = self.diversity.known_features(pixels_of(picture))
        if self.known is None:
            return dict.fromkeys(self.diversity.names), features
        components = self.diversity.of_features(features, self.known).components
        return {name: item_or_none(value) for name, value in components.items()}, features

    def join(self, features: Mapping[str, torch.Tensor]) -> None:
        self.known = dict(features) if self.known is None else join_features([self.known, features])


def check_count_and_prompt(count: int, prompt: str) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"Expected `count` to be an integer of 1 or more, but got {count!r}.")
    if not isinstance(prompt, str):
        raise ValueError(f"Expected one prompt for the set, but got {prompt!r}. Grow a set for each prompt.")


def check_not_given(arguments: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    if given := sorted(arguments.keys() & set(names)):
        raise ValueError(
            f"Expected {place} without {given}, which a set that grows chooses itself, one image at a time. Leave them "
            "out; seeds are given as `generator=7`."
        )


def single_noise_sampler(noise_sampler: NoiseSamplerSpec | None) -> Any:
    """A noise sampler by its name or as it is. Raises `ValueError` for one that needs several images at a time."""
    found: Any = as_noise_sampler(noise_sampler)
    try:
        return found.within([0]) if hasattr(found, "within") else found
    except ValueError as error:
        raise ValueError(
            f"Expected a noise sampler that draws one image at a time, but got {noise_sampler!r}. Take 'white' or "
            "'pink' for a set that grows."
        ) from error


def sequential_method(method: Any, settings: dict[str, Any] | None) -> NoiseOptimizer:
    """The method of a set that grows. Raises `TypeError` for one that knows no references."""
    if method is None:
        return NeverTooLate(**{**sequential_settings("diversity" not in (settings or {})), **(settings or {})})
    found: Any = as_noise_optimizer(method, settings)
    fields = getattr(found, "__dataclass_fields__", {})
    if not {"diversity", "references"} <= fields.keys():
        raise TypeError(
            "Expected a method with `diversity` and `references`, such as `NeverTooLate`, which compares a noise with "
            f"images that are given, but {type(found).__name__} has none."
        )
    return found


def sequential_settings(of_diversity: bool) -> dict[str, Any]:
    """Those of the paper for this mode, by the names of `NeverTooLate`; `diversity` and its stop rule if asked for."""
    diversity = {"diversity": {"dpp": 15.0}, "stop_at": {"dpp": 0.98}} if of_diversity else {}
    return {**diversity, "steps": 25, "learning_rate": 3.0, "max_grad_norm": 0.15}


def with_loaded_parts(method: Any, diversity: SetRewardSum, device: Any) -> Any:
    """The method on these set rewards, with rewards and guards that have a name loaded once for all images."""
    loaded: dict[str, Any] = {"diversity": diversity}
    if (rewards := getattr(method, "rewards", None)) is not None:
        loaded["rewards"] = RewardSum(rewards, device=device)
    optimised = loaded["rewards"].names if "rewards" in loaded else []
    if guards := as_guards(getattr(method, "guard", None)):
        own = [isinstance(guard.reward, str) and not shares_reward(guard, optimised) for guard in guards]
        loaded["guard"] = [
            dataclasses.replace(guard, reward=RewardSum(guard.reward, device=device).rewards[0]) if load else guard
            for guard, load in zip(guards, own, strict=True)
        ]
    return dataclasses.replace(method, **loaded)


def seed_device(generator: Seeds) -> str:
    """Where noise is drawn: on the CPU, for the same noise on every device, unless a generator says otherwise."""
    return str(generator.device) if isinstance(generator, torch.Generator) else "cpu"


def further_seeds(generator: Seeds, count: int, known: Sequence[int]) -> list[int]:
    """The seeds of the images that a set lacks.

    Raises:
        ValueError: For seeds that are too few, are none, come twice, or are not those of the images that are there.
    """
    if generator is None:
        first = int(known[-1]) + 1 if known else int(torch.randint(2**32, ()))
        return list(range(first, first + count - len(known)))
    seeds = seeds_from(generator, count, max(count, len(known)))
    shared = min(len(seeds), len(known))
    if seeds[:shared] != list(known[:shared]):
        raise ValueError(
            f"Expected the seeds that the set was grown with, {list(known[:shared])}, but got {seeds[:shared]}. Pass "
            "those, or none to go on by 1."
        )
    return seeds[len(known) : count]


def seeds_from(generator: Any, count: int, wanted: int) -> list[int]:
    """At least `count` different seeds: `wanted` that go up by 1 from the given one, or those given."""
    first = generator.initial_seed() if isinstance(generator, torch.Generator) else generator
    given = range(first, first + wanted) if type(first) is int else generator
    seeds = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    valid = all(type(seed) is int and 0 <= seed < 2**64 for seed in seeds)
    if not valid or len(seeds) < count or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"Expected `generator` to be a seed of 0 or more, {count} different seeds, or a `torch.Generator`, but got "
            f"{generator!r}. From the seed s image k gets s + k."
        )
    return seeds


def begun_set(home: ImageSetFolder, empty: ImageSet) -> ImageSet:
    """The set in a folder, if it agrees with one that is empty, or that one, if a set can begin there."""
    if not home.begun:
        home.check_free()
        return empty
    found = ImageSet.load(home.path)
    found.check_agrees(empty.prompt, empty.settings, home.path)
    return found


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """An RGB image as `(1, 3, H, W)` in [0, 1], float32."""
    width, height = picture.size
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, height, width, 3)
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255


def without_images(result: NoiseResult) -> NoiseResult:
    """A result on the CPU, without its images: what is left of it once it is saved."""
    named = {name: getattr(result, name).cpu() for name in ("noise", "latents", "losses", "norms", "best_step")}
    scores = {name: values.cpu() for name, values in result.scores.items()}
    return dataclasses.replace(result, **named, scores=scores, images=None, initial_images=None)


def plain_scores_of(result: NoiseResult) -> dict[str, torch.Tensor]:
    """Name to `(B,)`: the scores of the plain result by the pipeline's own decoder."""
    if (report := result.reports.get(FULL_DECODER)) is None:
        return result.initial_scores
    return {name: torch.tensor(values) for name, values in report["initial_scores"].items()}


def item_or_none(value: torch.Tensor | None) -> float | None:
    return None if value is None else float(value)


# pipelines/reward_mixin.py


class RewardMixin(NoiseOptimizationMixin):
    """Makes a method of `rewards=` and its settings; rewards that have a name are loaded once per pipeline."""

    def method_on(
        self, method: Any, rewards: Any, settings: dict[str, Any], noise_optimizer: NoiseOptimizer | None
    ) -> NoiseOptimizer | None:
        """`method(rewards=..., **settings)`, or what was given instead; `None` leaves the stock pipeline.

        Raises:
            ValueError: settings without rewards, or rewards beside another method.
        """
        if rewards is None and settings:
            raise ValueError(
                f"Expected `rewards` beside {sorted(settings)}, but got none: there is nothing to optimise."
            )
        if rewards is not None and noise_optimizer is not None:
            raise ValueError("Expected `rewards` or `noise_optimizer`, but got both. Give the rewards to the method.")
        if rewards is None:
            return noise_optimizer
        return method(rewards=self.load_rewards(rewards, settings.get("reward_device")), **settings)

    def load_rewards(self, rewards: Any, device: Any = None) -> RewardSum:
        """A `RewardSum` on a device, by default the pipeline's; what has a name is loaded at its first use and kept."""
        check_reward_device(device)
        kept = self.kept_on(device, "_loaded_rewards")
        pairs = reward_weight_pairs(rewards, None)
        known = [(kept.get(str(name), name), weight) for name, weight in pairs]
        device = device or self._execution_device  # pyright: ignore[reportAttributeAccessIssue]
        total = RewardSum(known, normalization=getattr(rewards, "normalization", None), device=device)
        for (name, _), reward in zip(pairs, total.rewards, strict=True):
            if isinstance(name, str):
                kept[name] = reward
        return total

    def kept_on(self, device: Any, attribute: str) -> dict[str, Any]:
        """What this pipeline has loaded by name, for its own device or another one."""
        return vars(self).setdefault(attribute if device is None else f"{attribute}_on_{device}", {})


# pipelines/never_too_late_mixin.py


class NeverTooLateMixin(RewardMixin):
    """Adds what a set is optimised for and plain-value settings of Never Too Late to the call of a stock pipeline."""

    def __call__(
        self,
        *args,
        diversity: Any = None,
        rewards: Any = None,
        guard: Any = None,
        optimization_steps: int | None = None,
        learning_rate: float | None = None,
        never_too_late_kwargs: Mapping[str, Any] | None = None,
        noise_optimizer: NoiseOptimizer | None = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        callback_on_optimization_step_end: Any = None,
        save_noise_to: str | os.PathLike[str] | None = None,
        **kwargs,
    ):
        """The stock call; with `diversity` the noises of each prompt's images are first optimised as a set.

        Args:
            diversity: Set rewards with their weights: `"dpp"`, `{"dpp": 150.0}`, or on other features than their own
                `{"dpp": ("clip", 150.0)}`. `None` leaves the pipeline bit-identical to the stock class. Features that
                are given by name are loaded once per pipeline.
            rewards: What keeps each image good: `{"hpsv2.1": 3.0}`, or any callable `(images, prompts) -> (B,)`.
            guard: A floor under each image: `{"hpsv2.1": 0.05}` allows that drop from the plain image, `{"sharpness":
                {"keep": 0.8}}` keeps four fifths of it.
            optimization_steps: Sets that are drawn and scored, 50 by default.
            learning_rate: 6 by default.
            never_too_late_kwargs: More settings of `NeverTooLate`, by name: `{"stop_at": 0.98}`.
            noise_optimizer: Another method instead of Never Too Late.
            noise_sampler: What the initial noise is drawn from: `"white"`, as in the stock pipeline, `"pink"`, which
                the paper adds, `"coupled"`, a dict such as `{"name": "pink", "alpha": 0.3}`, or a function `(shape,
                generator, device, dtype)`. Works without a method too; not beside `latents`.
            callback_on_optimization_step_end: Callbacks per optimisation step: functions of the state, or objects with
                `on_step_end(state)`; return `False` to stop.
            save_noise_to: A file for the best noise so far, kept up to date and whole whatever ends the call.
            args, kwargs: Those of the stock pipeline; pass `num_images_per_prompt`.

        Returns:
            What the stock pipeline returns; unless `return_dict=False` with a `noise_result` attribute.

        Raises:
            ValueError: For settings that cannot work, and for a prompt with one image, before any model runs.
        """
        named = {"diversity": diversity, "rewards": rewards, "guard": guard}
        named |= {"steps": optimization_steps, "learning_rate": learning_rate}
        settings = call_settings(named, never_too_late_kwargs, "never_too_late_kwargs")
        diversity = settings.pop("diversity", None)
        if diversity is None and settings:
            raise ValueError(
                f"Expected `diversity` beside {sorted(settings)}, but got none: there is nothing to optimise. Pass "
                '`diversity={"dpp": 150.0}`, say.'
            )
        if diversity is not None and noise_optimizer is not None:
            raise ValueError("Expected `diversity` or `noise_optimizer`, but got both. Give it to the method.")
        if diversity is not None:
            noise_optimizer = self.never_too_late(diversity, settings)
        return super().__call__(
            *args,
            noise_optimizer=noise_optimizer,
            noise_sampler=noise_sampler,
            callback_on_optimization_step_end=callback_on_optimization_step_end,
            save_noise_to=save_noise_to,
            **kwargs,
        )

    def grow_set(
        self,
        prompt: str,
        count: int,
        *,
        diversity: Any = None,
        rewards: Any = None,
        guard: Any = None,
        optimization_steps: int | None = None,
        learning_rate: float | None = None,
        never_too_late_kwargs: Mapping[str, Any] | None = None,
        render: Mapping[str, Any] | None = None,
        generator: Seeds = None,
        noise_sampler: NoiseSamplerSpec | None = None,
        folder: str | Path | None = None,
        callback_on_optimization_step_end: Any = None,
        **kwargs,
    ) -> ImagePipelineOutput:
        """Grow a set of images of any size: each new one is optimised to differ from all before it. See `grow_set`.

        Args:
            prompt: One.
            count: Images in all. The first is the plain one.
            diversity: As in a call; `{"dpp": 15.0}` by default, and then an image is done at a value of 0.98 unless
                `never_too_late_kwargs` say otherwise.
            rewards, guard, never_too_late_kwargs: As in a call. The paper: `rewards={"hpsv2.1": 1.0}`.
            optimization_steps: For each image, 25 by default.
            learning_rate: 3 by default.
            render: Arguments that differ where an image is drawn for the set: `{"num_inference_steps": 4}`.
            generator: A seed s, from which image k gets s + k, or one for each image.
            noise_sampler: As in a call, `"white"` or `"pink"`.
            folder: Where each image is written; a set that is there already is continued up to `count`.
            callback_on_optimization_step_end: Callbacks per optimisation step of each image.
            kwargs: Those of the stock pipeline, without `num_images_per_prompt` and `latents`.

        Returns:
            An output with `images`, PIL, and an `image_set` attribute: the noises, the values, `save(folder)`.

        Raises:
            ValueError: For settings that cannot work, and a folder that is broken or of another set.
        """
        named = {"steps": optimization_steps, "learning_rate": learning_rate, "rewards": rewards, "guard": guard}
        settings = call_settings(named, never_too_late_kwargs, "never_too_late_kwargs")
        settings = {**sequential_settings(diversity is None), **settings}
        default = settings.pop("diversity", None)
        method = self.never_too_late(default if diversity is None else diversity, settings)
        own = {"render": render, "generator": generator, "noise_sampler": noise_sampler, "folder": folder}
        found = grow_set(self, prompt, count, method, callbacks=callback_on_optimization_step_end, **own, **kwargs)
        output = ImagePipelineOutput(images=list(found.pictures))
        vars(output)["image_set"] = found
        return output

    def never_too_late(self, diversity: Any, settings: dict[str, Any]) -> NeverTooLate:
        """The method, with everything that has a name loaded at its first use and kept."""
        guards = as_guards(settings.get("guard"))
        rewards = optimised_rewards(settings.get("rewards"), guards)
        entries = set_reward_entries(diversity)
        for entry in entries:
            check_set_reward_entry(*entry)
        device = settings.get("reward_device")
        rewards = None if rewards is None else self.load_rewards(rewards, device)
        guard = [self.load_guard(each, rewards, device) for each in guards] or None
        loaded = {"rewards": rewards, "guard": guard, "diversity": self.load_diversity(entries, device)}
        return NeverTooLate(**{**settings, **loaded})

    def load_guard(self, guard: QualityGuard, rewards: Any, device: Any) -> QualityGuard:
        """The guard with its reward loaded, unless it means one that is optimised."""
        if not isinstance(guard.reward, str) or shares_reward(guard, getattr(rewards, "names", ())):
            return guard
        (reward,) = self.load_rewards(guard.reward, device).rewards
        return dataclasses.replace(guard, reward=reward)

    def load_diversity(self, entries: list[tuple[Any, Any, Any]], device: Any) -> SetRewardSum:
        """A `SetRewardSum` on a device, by default the pipeline's."""
        parts = [(reward, self.load_features(reward, each, device), weight) for reward, each, weight in entries]
        return SetRewardSum(parts)

    def load_features(self, reward: Any, features: Any, device: Any) -> Any:
        """The features of a set reward: those of a name from the pipeline's own, any other as they are."""
        if not isinstance(reward, str):
            return features
        name = features or find_set_reward(reward).default_features
        if not isinstance(name, str | os.PathLike):
            return name
        name = os.fspath(name)
        kept = self.kept_on(device, "_loaded_features")
        if name not in kept:
            device = device or self._execution_device  # pyright: ignore[reportAttributeAccessIssue]
            kept[name] = AutoFeatures.from_pretrained(name, device=device)
        return kept[name]


# pipelines/never_too_late_turbo.py


class NeverTooLateTurboPipeline(NeverTooLateMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` whose images of one prompt form a set that differs. See `NeverTooLateMixin.__call__`.

    It's Never Too Late, https://arxiv.org/abs/2601.00090.

    Examples:
        >>> pipe = NeverTooLateTurboPipeline.from_pretrained("stabilityai/sdxl-turbo", dtype=torch.bfloat16).to("cuda")
        >>> one_step = {"num_inference_steps": 1, "guidance_scale": 0.0, "num_images_per_prompt": 4}
        >>> images = pipe("a dog in a park", diversity={"dpp": 150.0}, rewards={"hpsv2.1": 3.0}, **one_step).images
    """
