"""Objectives, regularizers, noise optimizers and the pipelines that carry the optimisation hook."""

from .best_of_n import BestOfN
from .cno import CNO
from .cno_flux import CNOFluxPipeline
from .cno_stable_diffusion import CNOStableDiffusionPipeline
from .cno_stable_diffusion_3 import CNOStableDiffusion3Pipeline
from .cno_stable_diffusion_xl import CNOStableDiffusionXLPipeline
from .contrast import ContrastiveObjective
from .group_selection import GroupSelection
from .group_solver import select_group
from .image_set import ImageSet, grow_set
from .mean_variance import MeanVariance
from .methods import list_noise_optimizers, register_noise_optimizer
from .never_too_late import NeverTooLate
from .never_too_late_flux import NeverTooLateFluxPipeline
from .never_too_late_stable_diffusion import NeverTooLateStableDiffusionPipeline
from .never_too_late_turbo import NeverTooLateTurboPipeline
from .noise_diffusion import NoiseDiffusion
from .noise_diffusion_flux import NoiseDiffusionFluxPipeline
from .noise_diffusion_stable_diffusion import NoiseDiffusionStableDiffusionPipeline
from .noise_diffusion_stable_diffusion_3 import NoiseDiffusionStableDiffusion3Pipeline
from .noise_diffusion_stable_diffusion_xl import NoiseDiffusionStableDiffusionXLPipeline
from .noise_hook import NoiseOptimizationMixin, optimize_noise
from .noise_optimizer import NoiseOptimizer
from .noise_pgd import NoisePGD
from .noise_result import NoiseResult
from .objectives import FunctionObjective, Objective, RewardObjective
from .pcn import PCN
from .quality_guard import QualityGuard
from .regularizers import ChiPrior
from .reno import ReNO
from .reno_stable_diffusion import ReNOStableDiffusionPipeline
from .reno_turbo import ReNOTurboPipeline
from .sampling import PipelineSampler, Sample
from .set_objective import SetObjective
from .zero_order_search import ZeroOrderSearch

__all__ = [
    "BestOfN",
    "CNO",
    "CNOFluxPipeline",
    "CNOStableDiffusion3Pipeline",
    "CNOStableDiffusionPipeline",
    "CNOStableDiffusionXLPipeline",
    "ChiPrior",
    "ContrastiveObjective",
    "FunctionObjective",
    "GroupSelection",
    "ImageSet",
    "MeanVariance",
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
    "Objective",
    "PCN",
    "PipelineSampler",
    "QualityGuard",
    "ReNO",
    "ReNOStableDiffusionPipeline",
    "ReNOTurboPipeline",
    "RewardObjective",
    "Sample",
    "SetObjective",
    "ZeroOrderSearch",
    "grow_set",
    "list_noise_optimizers",
    "optimize_noise",
    "register_noise_optimizer",
    "select_group",
]
