"""noiseopt: choose and optimise the initial noise of diffusers text-to-image pipelines."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import (
        EarlyStopping,
        HeldOutReward,
        History,
        LossThreshold,
        NoiseCallback,
        NoiseState,
        ProgressBar,
        StepImages,
        TimeBudget,
    )
    from .pipelines import (
        CNO,
        BestOfN,
        ChiPrior,
        CNOFluxPipeline,
        CNOStableDiffusion3Pipeline,
        CNOStableDiffusionPipeline,
        CNOStableDiffusionXLPipeline,
        ContrastiveObjective,
        FunctionObjective,
        GroupSelection,
        ImageSet,
        MeanVariance,
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
        NoiseOptimizer,
        NoisePGD,
        NoiseResult,
        Objective,
        QualityGuard,
        ReNO,
        ReNOStableDiffusionPipeline,
        ReNOTurboPipeline,
        RewardObjective,
        SetObjective,
        grow_set,
        list_noise_optimizers,
        optimize_noise,
        register_noise_optimizer,
        select_group,
    )
    from .rewards import (
        DPP,
        AutoFeatures,
        AutoReward,
        CLIPFlanT5,
        CLIPScore,
        ColorChannel,
        Complexity,
        PairwiseDistance,
        PairwiseDiversity,
        Reward,
        RewardSum,
        SetReward,
        SetRewardSum,
        Sharpness,
        SoftTIFA,
        Vendi,
        VQAScorer,
        list_features,
        list_rewards,
        list_set_rewards,
        register_reward,
        register_set_reward,
    )
    from .schedulers import (
        CoupledNoise,
        NoiseSampler,
        PinkNoise,
        WhiteNoise,
        list_noise_samplers,
        predict_x0,
        register_noise_sampler,
    )

try:
    __version__ = version("noiseopt")
except PackageNotFoundError:  # the folder is on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "AutoFeatures",
    "AutoReward",
    "BestOfN",
    "CLIPFlanT5",
    "CLIPScore",
    "CNO",
    "CNOFluxPipeline",
    "CNOStableDiffusion3Pipeline",
    "CNOStableDiffusionPipeline",
    "CNOStableDiffusionXLPipeline",
    "ChiPrior",
    "ColorChannel",
    "Complexity",
    "ContrastiveObjective",
    "CoupledNoise",
    "DPP",
    "EarlyStopping",
    "FunctionObjective",
    "GroupSelection",
    "HeldOutReward",
    "History",
    "ImageSet",
    "LossThreshold",
    "MeanVariance",
    "NoiseCallback",
    "NeverTooLate",
    "NeverTooLateFluxPipeline",
    "NeverTooLateStableDiffusionPipeline",
    "NeverTooLateTurboPipeline",
    "NoiseDiffusion",
    "NoiseDiffusionFluxPipeline",
    "NoiseDiffusionStableDiffusion3Pipeline",
    "NoiseDiffusionStableDiffusionXLPipeline",
    "NoiseDiffusionStableDiffusionPipeline",
    "NoiseOptimizationMixin",
    "NoiseOptimizer",
    "NoisePGD",
    "NoiseResult",
    "NoiseSampler",
    "NoiseState",
    "Objective",
    "PairwiseDistance",
    "PairwiseDiversity",
    "PinkNoise",
    "ProgressBar",
    "QualityGuard",
    "ReNO",
    "ReNOStableDiffusionPipeline",
    "ReNOTurboPipeline",
    "Reward",
    "RewardObjective",
    "RewardSum",
    "SetObjective",
    "SetReward",
    "SetRewardSum",
    "Sharpness",
    "SoftTIFA",
    "StepImages",
    "TimeBudget",
    "VQAScorer",
    "WhiteNoise",
    "Vendi",
    "grow_set",
    "list_features",
    "list_noise_optimizers",
    "list_noise_samplers",
    "list_rewards",
    "list_set_rewards",
    "optimize_noise",
    "predict_x0",
    "register_noise_optimizer",
    "register_noise_sampler",
    "register_reward",
    "register_set_reward",
    "select_group",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: diffusers takes seconds, and `noiseopt --help` needs nothing of it."""
    if name in __all__:
        for folder in ("callbacks", "schedulers", "rewards", "pipelines"):
            module = importlib.import_module(f".{folder}", __name__)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
