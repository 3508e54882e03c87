"""Objectives, regularizers, noise optimizers and the pipelines that carry the optimisation hook."""

from .best_of_n import BestOfN
from .methods import list_noise_optimizers, register_noise_optimizer
from .noise_hook import NoiseOptimizationMixin, optimize_noise
from .noise_optimizer import NoiseOptimizer
from .noise_result import NoiseResult
from .objectives import FunctionObjective, Objective, RewardObjective
from .regularizers import ChiPrior
from .reno import ReNO
from .reno_stable_diffusion import ReNOStableDiffusionPipeline
from .reno_turbo import ReNOTurboPipeline
from .sampling import PipelineSampler, Sample

__all__ = [
    "BestOfN",
    "ChiPrior",
    "FunctionObjective",
    "NoiseOptimizationMixin",
    "NoiseOptimizer",
    "NoiseResult",
    "Objective",
    "PipelineSampler",
    "ReNO",
    "ReNOStableDiffusionPipeline",
    "ReNOTurboPipeline",
    "RewardObjective",
    "Sample",
    "list_noise_optimizers",
    "optimize_noise",
    "register_noise_optimizer",
]
