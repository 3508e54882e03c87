"""The plan of an evaluation, parsed from strings and checked before any model is loaded."""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, shapes_world
from ..callbacks.cads import CADS
from ..callbacks.interval_guidance import IntervalGuidance
from ..callbacks.particle_guidance import ParticleGuidance
from ..image_files import is_picture, read_image
from ..pipelines.baselines.plain_sampling import PlainSampling
from ..pipelines.method import NoiseOptimizer
from ..pipelines.presets import GOALS
from ..pipelines.registry import METHODS, list_methods
from ..pipelines.reward_guidance.guidance import RewardGuidance
from ..pipelines.searches.best_of_n import BestOfN
from ..pipelines.seed_variance.diversity_boost import DiversityBoost
from ..pipelines.seed_variance.embedding_noise import EmbeddingNoise
from ..registry import did_you_mean
from ..rewards.contract.registry import EMBEDDED_REWARDS, find_reward
from ..rewards.contract.reward_sum import REWARD_PRESETS
from ..rewards.features.auto_features import find_features
from ..rewards.features.features import FEATURES, FeatureMetric, check_folder, import_optional
from ..rewards.sets.set_reward_sum import check_set_reward_entry, set_reward_entries
from ..schedulers.noise_samplers import as_noise_sampler
from .embedded_diversity import TOWERS, embedded_diversity, features_of, tower, towers_of
from .prompt_sets import PromptSet

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
EMBEDDED_FEATURES = ("dinov2", "clip")
HELD_OUT_FEATURES = "facebook/dinov2-base"  # for models that are not embedded
CALLBACKS: dict[str, Callable[..., Any]] = {
    "cads": CADS,
    "interval_guidance": IntervalGuidance,
    "particle_guidance": ParticleGuidance,
}
STEERED: dict[str, Callable[..., Any]] = {"diversity_boost": DiversityBoost, "embedding_noise": EmbeddingNoise}
GROWING = (
    "models",
    "methods",
    "prompts",
    "prompts sha256",
    "best of",
    "references",
)  # settings of a folder that may change
TIME = re.compile(r"=\s*(\d+\.?\d*|\.\d+)(ms|s|m|min|h)\s*(?=,|$)")  # `budget=20s`, which is no Python
NEIGHBORS = 5  # of a reference, for coverage
RESERVED = ("prompt", "generator", "latents", "output_type", "num_images_per_prompt", "return_dict")


def parse_settings(text: str) -> dict[str, Any]:
    """Parse `"steps=20, mode=parity"` to a dictionary; values are Python literals, bare words or times such as `20s`.

    Raises:
        ValueError: For anything else.
    """
    quoted = TIME.sub(r'="\1\2"', text)
    try:
        call = ast.parse(f"settings({quoted})", mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
        raise ValueError(f"Expected settings such as 'steps=20,mode=parity', but got {text!r}.")
    return {str(keyword.arg): literal(keyword.value) for keyword in call.keywords}


def literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"Expected a Python literal or a word, but got {ast.unparse(node)!r}. Quote it.") from None


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """A model, as the name of an embedded one, a Hub id or a folder, with the arguments of its calls."""

    name: str
    call: Mapping[str, Any]

    @property
    def embedded(self) -> bool:
        return self.name in shapes_world.MODELS

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's own call."""
        return {name: value for name, value in self.call.items() if name != "noise_sampler"}

    @property
    def single_step(self) -> bool:
        """Return whether the call is known to have a single denoising step."""
        return self.call.get("num_inference_steps") == 1

    @property
    def source(self) -> str:
        """The argument of `from_pretrained`."""
        return shapes_world.path(self.name) if self.embedded else self.name

    @classmethod
    def parse(cls, name: str, call: Mapping[str, Any]) -> "ModelChoice":
        """Raise `ValueError` for an invalid model, or call arguments that the command sets itself."""
        if taken := [argument for argument in call if argument in RESERVED]:
            raise ValueError(
                f"Expected `--call` without {taken[0]}, which the command sets itself, but got {call[taken[0]]!r}. "
                "Leave it out."
            )
        check_noise_sampler(call.get("noise_sampler"), "--call")
        known = shapes_world.MODELS.get(name)
        if known is not None and known.is_pipeline:
            return cls(name, {**known.call, **call})
        if known is None and (os.path.isdir(name) or HUB_ID.fullmatch(name)):
            return cls(name, dict(call))
        pipelines = [model.name for model in shapes_world.MODELS.values() if model.is_pipeline]
        raise ValueError(
            f"Expected a model out of {', '.join(pipelines)}, a Hub id such as 'org/name', or a folder, but got "
            f"{name!r}.{did_you_mean(name, pipelines)}"
        )


@dataclasses.dataclass(frozen=True)
class MethodChoice:
    """A registered method with settings, labeled by the string that it was parsed from.

    The settings may have a `noise_sampler`, the distribution of the initial noise of the method and its control.
    """

    label: str
    name: str
    settings: Mapping[str, Any]

    @property
    def own_settings(self) -> dict[str, Any]:
        """The settings of the method itself."""
        return {name: value for name, value in self.settings.items() if name != "noise_sampler"}

    @property
    def names(self) -> list[str]:
        """The names of the arguments of the method."""
        return [field.name for field in dataclasses.fields(METHODS[self.name]) if field.init]

    @property
    def takes_rewards(self) -> bool:
        return "rewards" in self.names

    @property
    def diversity(self) -> Any:
        """The value of `diversity`, or `None` for a method without it."""
        return self.settings.get("diversity", getattr(METHODS[self.name], "diversity", None))

    @property
    def features(self) -> str | None:
        """The features by which the method compares images, if there is an embedded tower for them."""
        found = self.settings.get("features", getattr(METHODS[self.name], "features", None))
        return found if isinstance(found, str) and found in TOWERS else None

    @property
    def towers(self) -> set[str]:
        """The embedded models that replace the method's features on embedded models."""
        found = set() if self.diversity is None else towers_of(self.diversity)
        return found | ({TOWERS[self.features][0]} if self.features else set())

    @property
    def has_control(self) -> bool:
        """Return whether the method is compared with best-of-N at equal time; all but best-of-N itself are."""
        return not issubclass(METHODS[self.name], BestOfN)

    def build(self, rewards: Any, embedded_on: torch.device | None = None) -> NoiseOptimizer:
        """Build the method, with rewards if it takes any.

        Args:
            rewards: Anything that `RewardSum` takes.
            embedded_on: For embedded models, their device: `diversity` and `features` then use the embedded towers.
        """
        settings = {**self.own_settings, **({"rewards": rewards} if self.takes_rewards else {})}
        if embedded_on is not None and self.diversity is not None:
            settings["diversity"] = embedded_diversity(self.diversity, embedded_on)
        if embedded_on is not None and self.features is not None:
            settings["features"] = tower(self.features, embedded_on)
        return METHODS[self.name](**settings)

    def drawing(self, pipe: Any, rewards: Any, seeds: Sequence[int]) -> Callable[..., Any]:
        """Return the call that draws images, that of the pipeline unless this steers it; `seeds` has one per image."""
        return pipe

    def needs_steps(self) -> bool:
        """Return whether a call of a single denoising step cannot work."""
        return False

    @classmethod
    def parse(cls, text: str) -> "MethodChoice":
        """Parse `"reno"` or `"cno:gradient=full,gamma=1.0"`. Raises `ValueError` for invalid methods or settings."""
        name, _, settings = text.partition(":")
        kinds = {**dict.fromkeys(CALLBACKS, CallbackChoice), **dict.fromkeys(STEERED, SteeredChoice)}
        kinds |= {"reward_guidance": GuidanceChoice, "plain": PlainChoice}
        if name not in METHODS and name not in kinds:
            known = [*list_methods(), *kinds]
            raise ValueError(
                f"Expected a method out of {', '.join(known)}, but got {name!r}.{what_goals_are(name, known)}"
            )
        choice = kinds.get(name, cls)(text, name, parse_settings(settings))
        check_noise_sampler(choice.settings.get("noise_sampler"), text)
        choice.check()
        return choice

    def check(self) -> None:
        if "rewards" in self.settings:
            raise ValueError(f"Expected no rewards in {self.label!r}. Pass them as `--reward`, for all methods.")
        self.check_names([name for name in self.names if name != "rewards"])
        try:
            if self.diversity is not None:
                check_diversity(self.diversity)
            self.build(lambda images, prompts: images.mean((1, 2, 3))).check()
        except TypeError as error:
            raise ValueError(f"Expected settings that {self.name} takes, but got {self.label!r}: {error}.") from None

    def check_names(self, known: Sequence[str]) -> None:
        """Raise `ValueError` for a setting that is not known."""
        known = [*known, "noise_sampler"]
        if unknown := [name for name in self.settings if name not in known]:
            hint = did_you_mean(unknown[0], known)
            raise ValueError(
                f"Expected settings of {self.name} out of {', '.join(known)}, but got {unknown[0]!r}.{hint}"
            )


@dataclasses.dataclass(frozen=True)
class NoMethodChoice(MethodChoice):
    """What takes the initial noise and optimizes none."""

    @property
    def diversity(self) -> Any:
        return None

    @property
    def features(self) -> str | None:
        return None

    @property
    def takes_rewards(self) -> bool:
        return False

    @property
    def has_control(self) -> bool:
        return False

    def build(self, rewards: Any, embedded_on: torch.device | None = None) -> NoiseOptimizer:
        return PlainSampling()


@dataclasses.dataclass(frozen=True)
class PlainChoice(NoMethodChoice):
    """Plain sampling from another `noise_sampler`."""

    def check(self) -> None:
        self.check_names([])
        if not self.settings:
            raise ValueError(
                f"Expected a noise_sampler for plain sampling, which is compared anyway, but got {self.label!r}. "
                "Leave it out, or pass 'plain:noise_sampler=pink'."
            )


@dataclasses.dataclass(frozen=True)
class SteeringChoice(NoMethodChoice):
    """What steers the denoising steps, with settings."""

    def needs_steps(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class CallbackChoice(SteeringChoice):
    """A denoising callback with settings."""

    made_by = CALLBACKS

    def make(self, seeds: Sequence[int]) -> Any:
        """Return what steers a call; `seeds` has one seed per image, of its random numbers."""
        draws = "generator" in inspect.signature(self.made_by[self.name]).parameters
        generators = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]} if draws else {}
        return self.made_by[self.name](**self.own_settings, **generators)

    def drawing(self, pipe: Any, rewards: Any, seeds: Sequence[int]) -> Callable[..., Any]:
        callback = self.make(seeds)
        callback.check(pipe)
        inputs = callback.tensor_inputs
        return functools.partial(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)

    def check(self) -> None:
        known = inspect.signature(self.made_by[self.name]).parameters
        self.check_names([name for name in known if name != "generator"])
        try:
            self.make([0])
        except TypeError as error:
            raise ValueError(f"Expected settings that {self.name} takes, but got {self.label!r}: {error}.") from None


@dataclasses.dataclass(frozen=True)
class SteeredChoice(CallbackChoice):
    """A `SteeredCall` with settings, which acts in the first model call too."""

    made_by = STEERED

    def needs_steps(self) -> bool:
        return bool(getattr(self.make([0]), "attenuation", 0))

    def drawing(self, pipe: Any, rewards: Any, seeds: Sequence[int]) -> Callable[..., Any]:
        return functools.partial(self.make(seeds).generate, pipe)

    def check(self) -> None:
        super().check()
        self.make([0]).check()


@dataclasses.dataclass(frozen=True)
class GuidanceChoice(SteeringChoice):
    """`RewardGuidance` with settings, by the rewards of the plan."""

    @property
    def names(self) -> list[str]:
        return [field.name for field in dataclasses.fields(RewardGuidance)]

    @property
    def takes_rewards(self) -> bool:
        return True

    @property
    def has_control(self) -> bool:
        return True

    def guidance(self, rewards: Any) -> RewardGuidance:
        return RewardGuidance(rewards=rewards, **self.own_settings)

    def build(self, rewards: Any, embedded_on: torch.device | None = None) -> NoiseOptimizer:
        self.guidance(rewards).check()
        return super().build(rewards, embedded_on)

    def drawing(self, pipe: Any, rewards: Any, seeds: Sequence[int]) -> Callable[..., Any]:
        return functools.partial(self.guidance(rewards).generate, pipe)


def what_goals_are(name: str, known: Sequence[str]) -> str:
    """Return the remedy for an unknown method: where the methods of a goal are listed, or the closest name."""
    if name in GOALS:
        return f" It is a goal of `optimize_noise`: `noiseopt presets --goal {name}` lists the methods that it picks."
    return did_you_mean(name, known)


def with_noise_samplers(methods: Sequence[str], noise_samplers: Sequence[str]) -> tuple[MethodChoice, ...]:
    """Parse plain sampling and methods, each with every noise sampler, such as `"pink"` or `"pink:alpha=0.3"`.

    "white" stands for a method as it is. A method that names a `noise_sampler` itself keeps it.

    Raises:
        ValueError: For unknown methods, noise samplers or settings.
    """
    settings = [None if text == "white" else sampler_setting(text) for text in noise_samplers]
    found = [MethodChoice.parse(f"plain:{setting}") for setting in settings if setting]
    for text in methods:
        choice = MethodChoice.parse(text)
        for setting in [None] if "noise_sampler" in choice.settings else settings:
            name, _, own = text.partition(":")
            joined = f"{name}:{own},{setting}" if own else f"{name}:{setting}"
            found.append(choice if setting is None else MethodChoice.parse(joined))
    return tuple(found)


def sampler_setting(text: str) -> str:
    """Return a noise sampler as a setting of a method. Raises `ValueError` for one that there is not."""
    name, _, own = text.partition(":")
    sampler = {"name": name, **parse_settings(own)} if own else name
    check_noise_sampler(sampler, "--noise-sampler")
    return f"noise_sampler={sampler!r}" if own else f"noise_sampler={sampler}"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to choose the noise: plain sampling, a method, or the control of a method.

    Attributes:
        key: Its name in files.
        method: The method, or the one that this is the control of; `None` for plain sampling.
        control: Whether it is best-of-N at the time of `method`.
    """

    key: str
    method: MethodChoice | None = None
    control: bool = False

    @property
    def folder(self) -> str:
        return slug(self.key)


PLAIN = Contender("plain")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A unit of an evaluation: the images of one prompt by one contender on one model.

    Attributes:
        model, contender: Those of the plan.
        index: The place of the prompt in the plan.
        best_of: N of best-of-N, for a control.
    """

    model: ModelChoice
    contender: Contender
    index: int
    best_of: int | None = None

    def __str__(self) -> str:
        return f"{self.model.name}, {self.contender.key} and prompt {self.index}"


def control_of(method: MethodChoice) -> Contender:
    """Return best-of-N at the time of a method."""
    return Contender(f"best-of-N for {method.label}", method, control=True)


def slug(text: str) -> str:
    """Return a file name: the text itself, or its valid characters and a hash."""
    kept = re.sub(r"[^\w.=,+-]+", "-", text)
    return kept if kept == text else f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Models × methods × prompts × seeds, and the measurements of each image.

    Attributes:
        models, methods: At least one each, without duplicates.
        prompts: The prompts in order.
        seeds: Images per prompt, generated in one call as a set.
        rewards: Name and weight of the optimized rewards, at least one.
        watched: Names of rewards that are only measured.
        features: The embedding for similarity, diversity and coverage, compared by cosine, or `None`.
        more_features: Others, by which only the images of a prompt are compared, by any distance.
        references: A folder of images for coverage, or `None`.
        best_of: N of best-of-N; `None` to measure the N that takes as long as each method.
        device, dtype: Of the models; `None` for the default.
        threads: CPU threads; results depend on them in the last digits.
    """

    models: tuple[ModelChoice, ...]
    methods: tuple[MethodChoice, ...]
    prompts: PromptSet
    seeds: int
    rewards: tuple[tuple[str, float], ...]
    watched: tuple[str, ...] = ()
    features: str | None = None
    more_features: tuple[str, ...] = ()
    references: str | None = None
    best_of: int | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        distinct("model", [model.name for model in self.models])
        distinct("method", [method.label for method in self.methods])
        distinct("reward", [*(name for name, _ in self.rewards), *self.watched])
        for name in (*(name for name, _ in self.rewards), *self.watched):
            check_reward(name, self.models)
        if not all(weight > 0 for _, weight in self.rewards):
            raise ValueError(
                f"Expected weights above 0, but got {dict(self.rewards)}. Pass rewards that are only measured as "
                "`--watch`."
            )
        if not self.rewards:
            raise ValueError(
                "Expected at least one `--reward`, which best-of-N, the control, needs, but got none. `noiseopt "
                "rewards` lists them."
            )
        check_device(self.device)
        self.check_references()
        self.check_features()
        self.check_prompts()
        self.check_pairs()

    def check_features(self) -> None:
        """Raise `ValueError` for features that are unknown, not installed or repeated, or a distance as embedding."""
        distinct("feature map", self.all_features)
        for name in self.all_features:
            if not self.is_tower(name):
                check_features(name)
        if self.features is not None and (metric := metric_of(self.features)) != "cosine":
            raise ValueError(
                f"Expected features that are compared by cosine, for similarity and Vendi score, but '{self.features}' "
                f"uses the {metric} distance. Use dinov2, dinov2_patch, clip or dreamsim."
            )

    def check_references(self) -> None:
        """Raise `ValueError` unless there are no references, or enough that can be read, and features to compare."""
        if self.references is None:
            return
        files = reference_files(self.references)
        if self.features is None:
            raise ValueError(
                "Expected features beside `--references`, to compare images with them, but got none. Pass `--features "
                "dinov2`, or leave out the references."
            )
        for path in files:
            read_image(path)

    def check_prompts(self) -> None:
        """Raise `ValueError` for a prompt outside the shapes world if a model is embedded."""
        if not self.prompts.prompts:
            raise ValueError(f"Expected at least one prompt, but got none in {self.prompts.name}. Pass other prompts.")
        if not any(model.embedded for model in self.models):
            return
        for number, prompt in enumerate(self.prompts.prompts, 1):
            try:
                shapes_world.parse(prompt.text)
            except ValueError as error:
                raise ValueError(f"{prompt.where or f'prompt {number} of {self.prompts.name}'}: {error}") from None

    def check_pairs(self) -> None:
        """Raise `ValueError` for a method that a model cannot run, as far as that is known without loading it."""
        for model in self.models:
            for method in self.methods:
                if model.single_step and method.needs_steps():
                    raise ValueError(
                        f"Expected at least 2 denoising steps for {method.label}, which acts from one step on the "
                        f"next, but got 1 on {model.name}. Leave out that method or that model, or pass `--call "
                        "num_inference_steps=2`."
                    )

    def category(self, index: int) -> str | None:
        """Return the category of a prompt from its source, or from the shapes world."""
        prompt = self.prompts.prompts[index]
        known = prompt.category is not None or not self.of_shapes_world
        return prompt.category if known else shapes_world.category(prompt.text)

    @functools.cached_property
    def of_shapes_world(self) -> bool:
        """Return whether the judge can read all prompts."""
        try:
            return all(shapes_world.parse(prompt.text) is not None for prompt in self.prompts.prompts)
        except ValueError:
            return False

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """Plain sampling, and each method after its control."""
        found = [PLAIN]
        for method in self.methods:
            if method.has_control:
                found.append(control_of(method))
            found.append(Contender(method.label, method))
        return tuple(found)

    @property
    def all_features(self) -> list[str]:
        """The embedding, if there is one, and the other features."""
        return [*([] if self.features is None else [self.features]), *self.more_features]

    def is_tower(self, features: str | None) -> bool:
        """Return whether features are an embedded tower, which shares its name with a larger model."""
        return features in EMBEDDED_FEATURES and all(model.embedded for model in self.models)

    def optimizes(self, features: str | None) -> bool:
        """Return whether a method optimizes the model of features, through its diversity or a reward."""
        diversities = [method.diversity for method in self.methods if method.diversity is not None]
        names = {checkpoint_of(each) for diversity in diversities for each in features_of(diversity)}
        return features is not None and (features in dict(self.rewards) or checkpoint_of(features) in names)

    @property
    def reward_names(self) -> list[str]:
        """All measured rewards, the optimized ones first."""
        return [name for name, _ in self.rewards] + list(self.watched)

    def seed(self, prompt: int, image: int) -> int:
        """Return the seed of an image's initial noise, the same for every method."""
        return 1_000_003 * image + prompt

    def cell(self, model: ModelChoice, contender: Contender, index: int, n: Mapping[tuple[str, str], int]) -> Cell:
        """Return a unit; `n` has N of best-of-N by model and label of the method, as far as it is known."""
        control = contender.method if contender.control else None
        return Cell(model, contender, index, n.get((model.name, control.label)) if control else None)

    def key(self, cell: Cell, settings: Mapping[str, Any]) -> str:
        """Return a hash of everything that a unit depends on; `settings` are those of the plan on its device."""
        method = cell.contender.method
        depends = {
            **{name: value for name, value in settings.items() if name not in GROWING},
            "model": [cell.model.name, dict(cell.model.call)],
            "contender": cell.contender.key,
            "method": method and [method.name, dict(method.settings)],
            "best of": cell.best_of,
            "prompt": self.prompts.prompts[cell.index].text,
            "first seed": self.seed(cell.index, 0),
            "of the shapes world": self.of_shapes_world,
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True, default=repr).encode()).hexdigest()[:8]

    def settings(self, device: str) -> dict[str, Any]:
        """Return everything that the results depend on, as plain values."""
        texts = "\n".join(prompt.text for prompt in self.prompts.prompts)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
        return {
            "models": {model.name: dict(model.call) for model in self.models},
            "methods": {method.label: {"name": method.name, **method.settings} for method in self.methods},
            "prompts": f"{self.prompts.name}: {len(self.prompts.prompts)}",
            "prompts sha256": hashlib.sha256(texts.encode()).hexdigest(),
            "seeds": self.seeds,
            "rewards": dict(self.rewards),
            "watched": list(self.watched),
            "features": self.features,
            "features are embedded": self.is_tower(self.features),
            **({"more features": list(self.more_features)} if self.more_features else {}),  # as in older folders
            "references": self.references and str(Path(self.references).resolve()),
            "best of": self.best_of,
            "device": device,
            "dtype": self.dtype,
            "threads": self.threads,
            "versions": {"noiseopt": __version__, **versions},
        }


def reference_files(folder: str) -> list[Path]:
    """Return the image files in a folder and those below it, by name. Raises `ValueError` for too few."""
    if not os.path.isdir(folder):
        raise ValueError(f"Expected a folder of images as references, but got {folder!r}. Pass an existing folder.")
    found = sorted(path for path in Path(folder).rglob("*") if is_picture(path))
    if len(found) <= NEIGHBORS:
        raise ValueError(
            f"Expected more than {NEIGHBORS} images as references, but got {len(found)} in {folder}. Add more images, "
            "or choose another folder."
        )
    return found


def distinct(what: str, names: Sequence[str]) -> None:
    """Raise `ValueError` unless there are names without duplicates."""
    if what in ("model", "method") and not names:
        raise ValueError(f"Expected at least one {what}, but got none. Pass `--{what}`.")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"Expected each {what} once, but got {repeated[0]!r} {names.count(repeated[0])} times. Leave the "
            "others out."
        )


def check_noise_sampler(noise_sampler: Any, place: str) -> None:
    """Raise `ValueError` for a noise sampler that there is not."""
    try:
        as_noise_sampler(noise_sampler)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected a noise sampler in {place!r}: {error}") from None


def check_device(name: str | None) -> None:
    """Raise `ValueError` for a device that torch does not have here."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"Expected a device that this machine has, but got {name!r}: {reason}") from None


def check_diversity(diversity: Any) -> None:
    """Raise `ValueError` or `TypeError` for invalid weighted set rewards."""
    for entry in set_reward_entries(diversity):
        check_set_reward_entry(*entry)


def checkpoint_of(features: Any) -> Any:
    """Return the checkpoint that features load, to tell whether two share a model; else the features."""
    known = FEATURES.entries.get(features) if isinstance(features, str) else None
    return (known and known.default_checkpoint) or features


def check_reward(name: str, models: Sequence[ModelChoice] = ()) -> None:
    """Raise `ValueError` unless the name is a registered reward, a Hub id, a folder, or one for the embedded models."""
    if name not in EMBEDDED_REWARDS:
        embedded = all(model.embedded for model in models)
        find_reward(name, [*REWARD_PRESETS, *(EMBEDDED_REWARDS if embedded else ())])
    elif others := [model.name for model in models if not model.embedded]:
        large = {"clip": "clipscore", "vqa": "vqascore"}[name]
        raise ValueError(
            f"Expected a reward for images of {others[0]}, but {name!r} is of the shapes world. Did you mean {large!r}?"
        )


def metric_of(features: str) -> FeatureMetric:
    """Return the distance of features; a Hub id or folder is compared by cosine. Raises `ValueError` if unknown."""
    found = find_features(features)
    return "cosine" if found is None else found.metric


def diversity_measures(features: str) -> tuple[str, ...]:
    """Return what is measured of a set of images by features."""
    return ("mss", "vendi") if metric_of(features) == "cosine" else ("distance",)


def check_features(name: str) -> None:
    """Raise `ValueError` for features that are unknown, not installed, or a name without the folder of its weights."""
    features = find_features(name)
    if features is None:
        return
    check_folder(features, features.default_checkpoint)
    if features.package is not None:
        try:
            import_optional(features.package)
        except ImportError as error:
            raise ValueError(str(error)) from None
