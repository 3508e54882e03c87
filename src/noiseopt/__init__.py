"""noiseopt: choose and optimize the initial noise of diffusers text-to-image pipelines."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import shapes_world
    from .callbacks import EarlyStopping, HeldOutReward, TimeBudget
    from .pipelines import (
        CNO,
        PCN,
        BestOfN,
        CNOFluxPipeline,
        CNOStableDiffusion3Pipeline,
        CNOStableDiffusionPipeline,
        CNOStableDiffusionXLPipeline,
        DiversityBoost,
        EmbeddingNoise,
        GroupSelection,
        ImageSet,
        NeverTooLate,
        NeverTooLateFluxPipeline,
        NeverTooLateStableDiffusionPipeline,
        NeverTooLateTurboPipeline,
        NoiseDiffusion,
        NoiseDiffusionFluxPipeline,
        NoiseDiffusionStableDiffusion3Pipeline,
        NoiseDiffusionStableDiffusionPipeline,
        NoiseDiffusionStableDiffusionXLPipeline,
        NoiseOptimizationMixin,
        NoiseResult,
        ReNO,
        ReNOStableDiffusionPipeline,
        ReNOStableDiffusionXLPipeline,
        ReNOTurboPipeline,
        RewardGuidance,
        ZeroOrderSearch,
        find_preset,
        grow_set,
        list_methods,
        list_presets,
        noise_shape,
        optimize_noise,
        release_rewards,
    )
    from .rewards import AutoReward, BlackBox, RewardSum, list_rewards
    from .schedulers import PinkNoise, Vary

try:
    __version__ = version("noiseopt")
except PackageNotFoundError:  # the folder is on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "CNO",
    "PCN",
    "AutoReward",
    "BestOfN",
    "BlackBox",
    "CNOFluxPipeline",
    "CNOStableDiffusion3Pipeline",
    "CNOStableDiffusionPipeline",
    "CNOStableDiffusionXLPipeline",
    "DiversityBoost",
    "EarlyStopping",
    "EmbeddingNoise",
    "GroupSelection",
    "HeldOutReward",
    "ImageSet",
    "NeverTooLate",
    "NeverTooLateFluxPipeline",
    "NeverTooLateStableDiffusionPipeline",
    "NeverTooLateTurboPipeline",
    "NoiseDiffusion",
    "NoiseDiffusionFluxPipeline",
    "NoiseDiffusionStableDiffusion3Pipeline",
    "NoiseDiffusionStableDiffusionPipeline",
    "NoiseDiffusionStableDiffusionXLPipeline",
    "NoiseOptimizationMixin",
    "NoiseResult",
    "PinkNoise",
    "ReNO",
    "ReNOStableDiffusionPipeline",
    "ReNOStableDiffusionXLPipeline",
    "ReNOTurboPipeline",
    "RewardGuidance",
    "RewardSum",
    "TimeBudget",
    "Vary",
    "ZeroOrderSearch",
    "find_preset",
    "grow_set",
    "list_methods",
    "list_presets",
    "list_rewards",
    "noise_shape",
    "optimize_noise",
    "release_rewards",
    "shapes_world",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `noiseopt --help` need not wait for diffusers."""
    if name == "shapes_world":
        return importlib.import_module(".shapes_world", __name__)
    if name in __all__:
        for folder in ("callbacks", "schedulers", "rewards", "pipelines"):
            module = importlib.import_module(f".{folder}", __name__)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__all__", "__doc__", "__version__", *__all__])
