"""Sets of any size, grown one image at a time: each new image is optimized to differ from all before it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...callbacks.noise_callback import CallbackSpec
from ...rewards.contract.registry import LoadedModels
from ...rewards.contract.reward_sum import RewardSum
from ...rewards.sets.set_reward_sum import SetRewardSum, join_features
from ...schedulers.noise_samplers import NoiseSamplerSpec, as_noise_sampler, describe_noise_sampler
from ...shown_text import shown
from ..baselines.plain_sampling import PlainSampling
from ..hook import optimize_noise
from ..loading import loaded_models
from ..memory.tiny_decoder import FULL_DECODER
from ..method import NoiseOptimizer
from ..method_mixin import merged_settings
from ..registry import as_method
from ..request import bind_request, check_makes_images, check_paths, check_pipeline
from ..result_folder import Seeds, only_writer, seed_device, seeds_from
from ..results.noise_result import NoiseResult
from ..results.pipeline_description import describe_pipeline
from ..results.settings_diff import plain_description, settings_diff
from .image_set_folder import ImageSetFolder
from .method import NeverTooLate, weighted_rewards
from .quality_guard import as_guards, loaded_guards

OF_THE_SET = ("prompt", "latents", "generator", "num_images_per_prompt", "output_type", "return_dict")
OF_THE_NOISE = ("height", "width")


@dataclasses.dataclass(eq=False, repr=False)
class ImageSet:
    """The result of `grow_set`: `N` images of one prompt, each optimized to differ from those before it.

    Attributes:
        prompt: The prompt of all images.
        settings: Method, arguments of the call, noise sampler and model, as plain values.
        seeds: `N` seeds, one for the noise of each image.
        pictures: `N` PIL images, as the pipeline generates them.
        results: `N` results on the CPU, without images. The first image is not optimized: its result has the noise, the
            provenance, one loss of 0 and no scores.
        values: A table with a row for each image. `"dpp"` (the name of each set reward) is the value of all images so
            far; `"baseline dpp"` is the value with the baseline of the new image instead. `None` for the first image.
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
        last = ", ".join(f"{shown(name)} {value:.4g}" for name, value in (self.values or [{}])[-1].items() if value)
        return f"ImageSet({len(self)} images of {shown(repr(self.prompt))}{': ' if last else ''}{last})"

    @property
    def images(self) -> torch.Tensor:
        """The pictures as `(N, 3, H, W)` in [0, 1], float32 on the CPU."""
        if not self.pictures:
            return torch.zeros(0, 3, 0, 0)
        return torch.cat([pixels_of(picture) for picture in self.pictures])

    def write_first(self, count: int, home: ImageSetFolder) -> None:
        """Update a folder with the first `count - 1` images to the first `count`."""
        if count:
            home.write_image(count - 1, self.pictures[count - 1], self.results[count - 1])
        rows = {"seeds": self.seeds[:count], "values": self.values[:count]}
        home.write_record({"prompt": self.prompt, "settings": self.settings, **rows})

    def save(self, folder: str | Path) -> None:
        """Write `image_set.json`, and for each image `image_000.png` and its noise `image_000.safetensors`.

        Raises:
            ValueError: For a file, for a folder with a set, and for one to which another process writes.
        """
        home = ImageSetFolder(folder)
        with only_writer(home.path):
            home.check_free()
            for count in range(len(self) + 1):
                self.write_first(count, home)

    @classmethod
    def load(cls, folder: str | Path) -> "ImageSet":
        """Read a set written by `save` or `grow_set`. Nothing is unpickled.

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
        """Raise `ValueError`, naming the differences, unless the set has this prompt and these settings."""
        known = {"prompt": self.prompt, **self.settings}
        if changed := settings_diff(known, {"prompt": prompt, **settings}):
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
    reward_prompt: str | None = None,
    **call_kwargs,
) -> ImageSet:
    """Grow a set of images of any size: each new one is optimized to differ from all before it.

    The sequential mode of It's Never Too Late, https://arxiv.org/abs/2601.00090. The first image is the baseline. Each
    further noise is optimized alone, for the value of its image together with all before it, whose features are cached:
    the memory is that of one image's graph and the features, for any size of the set. Then the image is generated, and
    its features are added. The stop rule and the callbacks apply to each image.

    Args:
        pipe: Any loaded text-to-image pipeline; it stays as it is.
        prompt: One prompt.
        count: The number of images in all, at least 1.
        method: A method with `diversity` and `references`, or its name. References that it has belong to the set (and
            then the first image is optimized too). The default is `NeverTooLate` with `{"dpp": 15.0}` and the paper's
            settings for this mode: 25 steps, learning rate 3, clip 0.15, stopped at 0.98; the paper adds
            `{"hpsv2.1": 1.0}`.
        method_kwargs: The settings of a method given by name.
        render: Arguments of the call that differ when an image is generated for the set: with
            `{"num_inference_steps": 4}` one step finds the noise and four generate the image.
        generator: A seed s, from which image k gets s + k, one seed for each image, or a generator for its seed and
            device. By default the first seed is random, and a resumed set continues by 1.
        noise_sampler: The distribution of the noise, one image at a time: `"white"`, `"pink"` ... See `optimize_noise`.
        folder: The folder to which each image is written at once. A set that is there already is continued up to
            `count` images, and equals one that was never interrupted. A set of `count` images or more is returned.
        callbacks: Callbacks per optimization step of each image. See `NoiseCallback`.
        reward_prompt: The prompt that rewards are asked about; `None` for `prompt`.
        call_kwargs: The other arguments of `pipe(prompt, ...)`: steps, guidance, size ...

    Returns:
        The set. An exception carries the images so far as its `image_set`.

    Raises:
        ValueError: For settings that cannot work, and a folder that is broken, has a set with other settings, or is
            written to by another process.
        TypeError: For a method without references, or an argument that the pipeline does not take.
    """
    check_count_and_prompt(count, prompt)
    check_pipeline(pipe)
    check_makes_images(type(pipe))
    check_paths(folder=folder)
    device = seed_device(generator)
    call = SetCall(pipe, prompt, call_kwargs, dict(render or {}), noise_sampler, device, reward_prompt)
    growth = SetGrowth(call, sequential_method(method, method_kwargs), callbacks)
    if folder is None:
        return grown_set(growth, ImageSet(prompt, growth.settings()), None, generator, count)
    home = ImageSetFolder(folder)
    with only_writer(home.path):
        return grown_set(growth, begun_set(home, ImageSet(prompt, growth.settings())), home, generator, count)


def grown_set(
    growth: "SetGrowth", found: ImageSet, home: ImageSetFolder | None, generator: Seeds, count: int
) -> ImageSet:
    """Grow a set to `count` images, each of which is written to its folder at once."""
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
            del rows[len(found) :]  # of an image that was interrupted
        vars(error)["image_set"] = found
        raise
    return found


@dataclasses.dataclass
class SetCall:
    """The call that generates the images of a set, one at a time.

    Attributes:
        pipe: The pipeline.
        prompt: The prompt of all images.
        arguments: The arguments of the call in which a noise is optimized.
        render: The arguments that differ when an image is generated for the set.
        noise_sampler: The distribution of the noise.
        device: The device of its generators.
        reward_prompt: The prompt that rewards are asked about; `None` for `prompt`.

    Raises:
        ValueError: For arguments that the set chooses itself, and a noise sampler that cannot draw one image.
        TypeError: For arguments that the pipeline does not take.
    """

    pipe: Any
    prompt: str
    arguments: dict[str, Any]
    render: dict[str, Any]
    noise_sampler: Any
    device: str
    reward_prompt: str | None = None

    def __post_init__(self) -> None:
        check_not_given(self.arguments, OF_THE_SET, "the arguments of the call")
        check_not_given(self.render, OF_THE_SET + OF_THE_NOISE, "`render`")
        bind_request(self.pipe, (), {"prompt": self.prompt, **self.arguments, **self.render})
        self.noise_sampler = single_noise_sampler(self.noise_sampler)

    def find(self, method: NoiseOptimizer, seed: int, callbacks: Any = None) -> NoiseResult:
        """Optimize the noise of one image."""
        generator = torch.Generator(self.device).manual_seed(seed)
        own = {"callbacks": callbacks, "noise_sampler": self.noise_sampler, "generator": generator}
        own["reward_prompt"] = self.reward_prompt
        return optimize_noise(self.pipe, self.prompt, method, **own, **self.arguments)

    def draw(self, result: NoiseResult) -> Image.Image:
        """Generate the image of a noise."""
        own = {"latents": result.latents, "generator": result.generator()}
        return self.pipe(prompt=self.prompt, **own, **{**self.arguments, **self.render}).images[0].convert("RGB")

    def settings(self) -> dict[str, Any]:
        return {
            "arguments": plain_description(self.arguments),
            "render": plain_description(self.render),
            "noise_sampler": plain_description(describe_noise_sampler(self.noise_sampler)),
            "generator_device": self.device,
            "reward_prompt": self.reward_prompt,
            **describe_pipeline(self.pipe),
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
        }


class SetGrowth:
    """A growing set: its method, with everything given by name loaded once, and the features of its images so far.

    Raises:
        TypeError, ValueError: For a method that cannot grow a set.
    """

    def __init__(self, call: SetCall, method: NoiseOptimizer, callbacks: Any) -> None:
        self.call, self.callbacks = call, callbacks
        device, loaded = method.device_of_rewards(call.pipe), loaded_models(call.pipe)
        diversity = SetRewardSum(method.diversity, device=device, loaded=loaded)  # pyright: ignore[reportAttributeAccessIssue]
        self.diversity = diversity.as_released() if getattr(method, "mode", None) == "parity" else diversity
        self.method: Any = with_loaded_parts(method, self.diversity, device, loaded)
        self.method.check()
        self.method.objective(call.pipe)
        self.known: dict[str, torch.Tensor] | None = None
        if (given := self.method.references) is not None:
            self.join(self.diversity.known_features(given) if isinstance(given, torch.Tensor) else given)

    def settings(self) -> dict[str, Any]:
        """Return the settings that must agree for a set to be continued, as JSON reads them back."""
        method = {field.name: getattr(self.method, field.name) for field in dataclasses.fields(self.method)}
        named = {"name": type(self.method).__name__, **plain_description(method)}
        return json.loads(json.dumps({"method": named, **self.call.settings()}))

    def take_up(self, found: ImageSet) -> None:
        """Encode the images of a saved set, to continue it.

        Raises:
            ValueError: If the values of its set rewards, computed again, differ from the saved ones.
        """
        for index, picture in enumerate(found.pictures):
            values, features = self.values(picture)
            for name, value in values.items():
                saved = found.values[index].get(name)
                if value is not None and not (
                    isinstance(saved, float) and abs(saved - value) <= 1e-2 * max(1.0, abs(value))
                ):
                    raise ValueError(
                        f"Expected '{name}' to be {saved} at image {index} of the set, as saved, but got "
                        f"{value}. Pass the features that the set was grown with, or grow it again elsewhere."
                    )
            self.join(features)

    def add_image(self, found: ImageSet, seed: int) -> None:
        """Find the noise of one more image, generate it, and add it."""
        method, callbacks = PlainSampling(), None
        if self.known is not None:
            method, callbacks = dataclasses.replace(self.method, references=self.known), self.callbacks
        result = self.call.find(method, seed, callbacks)
        picture = self.call.draw(result)
        values, features = self.values(picture)
        baseline_scores = baseline_scores_of(result) if self.known is not None else {}
        baseline_values = {f"baseline {name}": item_or_none(baseline_scores.get(name)) for name in values}
        self.join(features)
        found.seeds.append(seed)
        found.results.append(result.without_images())
        found.values.append({**values, **baseline_values})
        found.pictures.append(picture)

    def values(self, picture: Image.Image) -> tuple[dict[str, float | None], dict[str, torch.Tensor]]:
        """Return the value of each set reward once `picture` joins the set, and the features of that image."""
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
            f"Expected {place} without {given}, which a growing set chooses itself, one image at a time. Leave them "
            "out; pass seeds as `generator=7`."
        )


def single_noise_sampler(noise_sampler: NoiseSamplerSpec | None) -> Any:
    """Return a noise sampler. Raises `ValueError` for one that needs several images at a time."""
    found: Any = as_noise_sampler(noise_sampler)
    try:
        found = found.further(None) if hasattr(found, "further") else found
        return found.within([0]) if hasattr(found, "within") else found
    except ValueError as error:
        raise ValueError(
            f"Expected a noise sampler that draws one image at a time, but got {noise_sampler!r}. Take 'white' or "
            "'pink' for a growing set."
        ) from error


def sequential_method(method: Any, settings: dict[str, Any] | None) -> NoiseOptimizer:
    """Return the method of a growing set. Raises `TypeError` for one without references."""
    if method is None:
        given = merged_settings({}, settings)
        return NeverTooLate(**{**sequential_settings("diversity" not in given), **given})
    found: Any = as_method(method, settings)
    fields = getattr(found, "__dataclass_fields__", {})
    if not {"diversity", "references"} <= fields.keys():
        raise TypeError(
            "Expected a method with `diversity` and `references`, such as `NeverTooLate`, which compares a noise with "
            f"images that are given, but {type(found).__name__} has none."
        )
    return found


def sequential_settings(of_diversity: bool) -> dict[str, Any]:
    """Return the paper's settings of `NeverTooLate` for this mode, with `diversity` and its stop rule if requested."""
    diversity = {"diversity": {"dpp": 15.0}, "stop_at": {"dpp": 0.98}} if of_diversity else {}
    return {**diversity, "steps": 25, "learning_rate": 3.0, "max_grad_norm": 0.15}


def with_loaded_parts(method: Any, diversity: SetRewardSum, device: Any, loaded: LoadedModels) -> Any:
    """Return the method with these set rewards, and with the rewards and guards that have names loaded."""
    parts: dict[str, Any] = {"diversity": diversity}
    guards = as_guards(getattr(method, "guard", None))
    rewards = weighted_rewards(getattr(method, "rewards", None), guards)
    if hasattr(method, "rewards"):
        parts["rewards"] = None if rewards is None else RewardSum(rewards, device=device, loaded=loaded)
    optimized = [] if rewards is None else parts["rewards"].names
    if guards:

        def load(reward: str) -> Any:
            return RewardSum(reward, device=device, loaded=loaded).rewards[0]

        parts["guard"] = loaded_guards(guards, optimized, load)
    return dataclasses.replace(method, **parts)


def further_seeds(generator: Seeds, count: int, known: Sequence[int]) -> list[int]:
    """Return the seeds of the images that a set lacks.

    Raises:
        ValueError: For too few seeds, invalid or repeated ones, or others than those of the existing images.
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


def begun_set(home: ImageSetFolder, empty: ImageSet) -> ImageSet:
    """Return the set that a folder has begun, or `empty` if it has none.

    Raises:
        ValueError: If the set in the folder has another prompt or other settings than `empty`.
    """
    if not home.begun:
        home.check_free()
        return empty
    found = ImageSet.load(home.path)
    found.check_agrees(empty.prompt, empty.settings, home.path)
    return found


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """Convert an RGB image to `(1, 3, H, W)` in [0, 1], float32."""
    width, height = picture.size
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, height, width, 3)
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255


def baseline_scores_of(result: NoiseResult) -> dict[str, torch.Tensor]:
    """Return by name the scores `(B,)` of the baseline with the pipeline's own decoder."""
    if (report := result.reports.get(FULL_DECODER)) is None:
        return result.initial_scores
    return {name: torch.tensor(values) for name, values in report["initial_scores"].items()}


def item_or_none(value: torch.Tensor | None) -> float | None:
    return None if value is None else float(value)
