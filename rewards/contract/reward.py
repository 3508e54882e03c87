"""The base class of rewards, and a wrapper for plain callables."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .frozen_module import FrozenModule
from .transforms import at_least_float32

RewardT = TypeVar("RewardT", bound="Reward")


class NonFiniteReward(ValueError):
    """Raised when a reward, its gradient or its input images are NaN or infinite."""


class NonDifferentiableReward(ValueError):
    """Raised when a gradient is requested from a reward that has none."""


class Reward(FrozenModule):
    """Base class of rewards: `reward(images, prompts) -> (B,)`, float32, higher is better, in the published units.

    A subclass implements `score`, and also `encode_text` if it has text features and `load` if it has weights. It
    passes its modules to this constructor, which freezes them. Scores keep their gradient with respect to the images.

    Attributes:
        name: The name under which scores are reported.
        differentiable: Whether scores have a gradient with respect to the images.
        requires_prompt: Whether `prompts=None` raises an error.
        range: The lowest and highest possible score, if the formula is bounded.
        license: The license of the default checkpoint.
        default_checkpoint: The Hub id that `from_pretrained()` loads.
        weights_file: The weights file of the default checkpoint, if it is not in the format of transformers. A folder
            that contains it is recognized as a checkpoint of this reward.
        published_at: The source of that file, for weights that are not on the Hub.
        parameter_count: The number of parameters of the default checkpoint.
        text_modules: Dotted names of the modules that only `encode_text` needs; `drop_text_encoder` removes them.
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
        # A run encodes its prompts once, not once per step; about 4 kB per prompt. The dtype of the tower is stored
        # beside the features, because a change of dtype requires encoding again.
        self.prompt_features: dict[str, tuple[torch.dtype, Tensor]] = {}
        self.has_text_encoder = True

    def forward(self, images: Tensor, prompts: str | Sequence[str] | None = None) -> Tensor:
        """Validate the input, score it, and validate the scores.

        Args:
            images: (B, 3, H, W), floating point, in [0, 1], on any device.
            prompts: One per image, or a single one for all.

        Returns:
            (B,) float32, on the device of `images`.

        Raises:
            ValueError: For invalid images or prompts, or if the scores do not have the shape (B,).
            NonFiniteReward: For NaN images or scores that are not finite.
            NonDifferentiableReward: If the images require a gradient and a reward with `differentiable = True` cut it.
        """
        check_images(images, f"reward '{self.name}'")
        texts = prompts_per_image(prompts, len(images), self.name, self.requires_prompt)
        device = self.device or images.device
        pixels = at_least_float32(images if self.differentiable else images.detach()).to(device)
        scores = self.score(pixels.clone(), texts)  # a copy, as rewards may write into theirs
        check_scores(scores, len(images), self.name)
        if pixels.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise NonDifferentiableReward(
                f"Expected a gradient from reward '{self.name}', but its scores are detached from the images. Remove "
                "`.detach()`, `.item()`, `no_grad` and round trips through NumPy or PIL from it, or set "
                "`differentiable = False` on it and use a method without gradients, such as best-of-N."
            )
        return scores.to(images.device, torch.float32)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score (B, 3, H, W) float32 images in [0, 1], on this reward's device, for B prompts; return (B,).

        The input is already validated. `prompts` are empty strings if none were passed to a reward that requires none.
        """
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `score`.")

    def check_size(self, prompt: str, height: int, width: int) -> None:
        """Raise `ValueError` if images of this size cannot be scored. Called before a diffusion model runs."""

    def encode_text(self, prompt: str) -> Tensor:
        """Return the features of one prompt, of any shape. Called once per prompt, without gradients."""
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `encode_text`.")

    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """Return the (N, ...) float32 features of N prompts. Each distinct prompt is encoded once and cached.

        Raises:
            ValueError: For a new prompt after `drop_text_encoder`.
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
                # Tensors created in inference mode could not enter a graph later.
                with torch.inference_mode(False), torch.no_grad():
                    self.prompt_features[text] = self.dtype, at_least_float32(self.encode_text(text))
        return torch.stack([self.prompt_features[text][1] for text in texts]).to(self.device)

    def drop_text_encoder(self, prompts: str | Sequence[str]) -> None:
        """Encode `prompts`, then free the text encoder, which has a third of the weights of a CLIP-H.

        Afterwards the reward accepts only these prompts and those that it encoded before. A reward that reads text and
        image together, or no text, is unchanged.
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

        `dtype` is the dtype of the weights: by default bfloat16 on CUDA and float32 elsewhere. Scores are always
        float32.
        """
        checkpoint = checkpoint or cls.require_default_checkpoint()
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        on_cuda = device is not None and torch.device(device).type == "cuda"
        reward = cls.load(str(checkpoint), hub)
        return reward.to(device=device, dtype=dtype or (torch.bfloat16 if on_cuda else torch.float32))

    @classmethod
    def require_default_checkpoint(cls) -> str:
        """Return the default checkpoint.

        Raises:
            ValueError: If there is none; the message says where the weights are.
        """
        if cls.default_checkpoint is None and cls.published_at is not None:
            raise ValueError(
                f"Expected a folder for reward '{cls.name}', whose weights are not on the Hub, but got only its name. "
                f"Download {cls.weights_file} from {cls.published_at} and pass the folder that contains it."
            )
        if cls.default_checkpoint is None:
            raise ValueError(f"`{cls.__name__}` has no default checkpoint. Pass a Hub id or a folder.")
        return cls.default_checkpoint

    @classmethod
    def load(cls: type[RewardT], checkpoint: str, hub: dict[str, Any]) -> RewardT:
        """Build the reward in float32 from a checkpoint.

        `hub` holds the revision, cache_dir, token and local_files_only of `from_pretrained`.
        """
        raise NotImplementedError(f"`{cls.__name__}` has no weights to load: build it with its constructor.")


class CallableReward(Reward):
    """Wrapper that makes any callable `(images, prompts) -> (B,)` a reward.

    `name`, `differentiable`, `requires_prompt`, `range` and `license` are read from the callable if it has them. The
    modules that it is made of are frozen and in evaluation mode while it scores: itself, the owner of a bound method,
    attributes, and the arguments of a `functools.partial`. (Modules that a function only mentions stay as they are.)
    """

    function: Callable[[Tensor, list[str]], Tensor]

    def __init__(self, function: Callable[[Tensor, list[str]], Tensor]):
        super().__init__()
        for index, module in enumerate(modules_behind(function)):
            self.add_module(f"module_{index}", module)
        vars(self)["function"] = function
        self.name = callable_name(function)
        source = function.func if isinstance(function, functools.partial) else function
        self.differentiable = getattr(source, "differentiable", True)
        self.requires_prompt = getattr(source, "requires_prompt", True)
        self.range = getattr(source, "range", None)
        self.license = getattr(source, "license", None)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        try:
            with evaluated(self):
                return self.function(images, prompts)
        except Exception as error:
            vars(error)["raised_by_reward"] = self.name
            raise


@contextlib.contextmanager
def evaluated(root: nn.Module) -> Iterator[None]:
    """Freeze a module and set it to evaluation mode; the previous state is restored on exit."""
    training = [module for module in root.modules() if module.training]
    trainable = [parameter for parameter in root.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def modules_behind(function: Any) -> list[nn.Module]:
    """Return the modules that a callable is, belongs to, has as attributes, or was partially applied to."""
    if isinstance(function, functools.partial):
        parts = (function.func, *function.args, *function.keywords.values())
        return [module for part in parts for module in modules_behind(part)]
    owner = getattr(function, "__self__", function)
    found = [owner] if isinstance(owner, nn.Module) else getattr(owner, "__dict__", {}).values()
    return [module for module in found if isinstance(module, nn.Module)]


def callable_name(function: Any) -> str:
    """Return the `name` or `__name__` of a callable, the class name of an object, or "reward" for a lambda."""
    if isinstance(function, functools.partial):
        function = function.func
    for name in (getattr(function, "name", None), getattr(function, "__name__", None), type(function).__name__):
        if isinstance(name, str):
            return "reward" if name == "<lambda>" else name
    return "reward"


def check_images(images: Tensor, who: str) -> None:
    """Raise unless `images` is a (B, 3, H, W) floating-point tensor in [0, 1], with a tolerance of 0.05.

    `who` is the model that receives the images, for the error message.
    """
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
    # Models silently score images in [-1, 1], and the gradients are finite, so the mistake would go unnoticed.
    if low < -0.05 or high > 1.05:
        raise ValueError(
            f"Expected pixels in [0, 1] for {who}, but got values from {low:.3g} to {high:.3g}. Map decoder "
            "output in [-1, 1] with `(images / 2 + 0.5).clamp(0, 1)`."
        )


def check_reward_device(device: Any) -> None:
    """Raise `ValueError` unless `device` is a device, its name, or `None`."""
    try:
        torch.empty(0, device=device if device is not None else "cpu")
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            'Expected `reward_device` to be a device of this machine, such as "cuda:1" or "cpu", or `None`, but got '
            f"{device!r}: {error}"
        ) from error


def prompts_per_image(prompts: str | Sequence[str] | None, batch: int, name: str, required: bool) -> list[str]:
    """Return `batch` prompts: a single one is repeated, and None becomes empty strings unless `required`."""
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
            f"{remedy_of_scores(scores, batch)}"
        )
    if scores.is_complex():
        raise ValueError(f"Expected real scores from reward '{name}', but got {scores.dtype}. Return `scores.abs()`.")
    finite = scores.detach().isfinite()
    if not finite.all():
        where = (~finite).nonzero().flatten().tolist()
        raise NonFiniteReward(
            f"Expected finite scores from reward '{name}', but those of images {where} are NaN or infinite. Load "
            "it with `dtype=torch.float32` if it ran in half precision."
        )


def remedy_of_scores(scores: Any, batch: int) -> str:
    """Return what to change in a reward that returns other `scores` than a tensor of shape (batch,)."""
    if isinstance(scores, Tensor) and scores.ndim == 0:
        return "Average each image alone: `values.flatten(1).mean(1)` in place of `values.mean()`."
    if isinstance(scores, Tensor) and scores.shape == (batch, 1):
        return "Drop the last dimension: `scores.squeeze(1)`."
    if isinstance(scores, Tensor):
        return "Average each image's values over everything but the batch, as in `values.flatten(1).mean(1)`."
    if isinstance(scores, tuple):
        return "Return the scores alone: `lambda images, prompts: reward(images, prompts)[0]`."
    return (
        "Return `torch.as_tensor(scores)`. Scores that were not computed by torch have no gradient: set "
        "`differentiable = False` on the reward, and use a method without gradients, such as `BestOfN`."
    )


def check_gradient(reward: Reward, prompts: str | None = "a photo", height: int = 64, width: int = 64) -> None:
    """Check on one random image that a gradient reaches the pixels, before any diffusion model runs.

    Warns if the gradient is zero everywhere, for example after `round()`. Does not change the global random state.

    Raises:
        NonDifferentiableReward: If the reward has `differentiable = False` or cuts the graph.
        NonFiniteReward: If the score or its gradient is NaN or infinite.
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
            f"The gradient of reward '{reward.name}' is zero on a random image, as after `round` or a threshold.",
            stacklevel=2,
        )
