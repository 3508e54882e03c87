"""Methods that optimize the initial noise, and pipelines with the optimization hook."""

from .baselines.mean_variance import MeanVariance
from .baselines.noise_pgd import NoisePGD
from .cno.contrastive_loss import ContrastiveObjective
from .cno.flux import CNOFluxPipeline
from .cno.method import CNO
from .cno.stable_diffusion import CNOStableDiffusionPipeline
from .cno.stable_diffusion_3 import CNOStableDiffusion3Pipeline
from .cno.stable_diffusion_xl import CNOStableDiffusionXLPipeline
from .hook import NoiseOptimizationMixin, optimize_noise
from .loading import release_rewards
from .method import GradientOptimizer, NoiseOptimizer
from .never_too_late.flux import NeverTooLateFluxPipeline
from .never_too_late.image_set import ImageSet, grow_set
from .never_too_late.method import NeverTooLate
from .never_too_late.quality_guard import QualityGuard
from .never_too_late.set_objective import SetObjective
from .never_too_late.stable_diffusion import NeverTooLateStableDiffusionPipeline
from .never_too_late.turbo import NeverTooLateTurboPipeline
from .noise_diffusion.flux import NoiseDiffusionFluxPipeline
from .noise_diffusion.method import NoiseDiffusion
from .noise_diffusion.stable_diffusion import NoiseDiffusionStableDiffusionPipeline
from .noise_diffusion.stable_diffusion_3 import NoiseDiffusionStableDiffusion3Pipeline
from .noise_diffusion.stable_diffusion_xl import NoiseDiffusionStableDiffusionXLPipeline
from .noise_math import ChiPrior
from .noise_shape import noise_shape
from .objective import FunctionObjective, Objective, RewardObjective
from .preset_table import Preset
from .presets import find_preset, list_presets
from .registry import list_methods, register_method
from .reno.method import ReNO
from .reno.stable_diffusion import ReNOStableDiffusionPipeline
from .reno.turbo import ReNOTurboPipeline
from .results.noise_result import NoiseResult
from .reward_guidance.guidance import RewardGuidance
from .sampling.sample import Sample
from .sampling.sampler import PipelineSampler
from .searches.best_of_n import BestOfN
from .searches.group_selection import GroupSelection
from .searches.group_solver import select_group
from .searches.pcn import PCN
from .searches.zero_order_search import ZeroOrderSearch
from .seed_variance.diversity_boost import DiversityBoost
from .seed_variance.embedding_noise import EmbeddingNoise
from .white_noise import WhiteNoiseProjection

ReNOStableDiffusionXLPipeline = ReNOTurboPipeline

__all__ = [
    "CNO",
    "PCN",
    "BestOfN",
    "CNOFluxPipeline",
    "CNOStableDiffusion3Pipeline",
    "CNOStableDiffusionPipeline",
    "CNOStableDiffusionXLPipeline",
    "ChiPrior",
    "ContrastiveObjective",
    "DiversityBoost",
    "EmbeddingNoise",
    "FunctionObjective",
    "GradientOptimizer",
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
    "NoiseDiffusionStableDiffusionPipeline",
    "NoiseDiffusionStableDiffusionXLPipeline",
    "NoiseOptimizationMixin",
    "NoiseOptimizer",
    "NoisePGD",
    "NoiseResult",
    "Objective",
    "PipelineSampler",
    "Preset",
    "QualityGuard",
    "ReNO",
    "ReNOStableDiffusionPipeline",
    "ReNOStableDiffusionXLPipeline",
    "ReNOTurboPipeline",
    "RewardGuidance",
    "RewardObjective",
    "Sample",
    "SetObjective",
    "WhiteNoiseProjection",
    "ZeroOrderSearch",
    "find_preset",
    "grow_set",
    "list_methods",
    "list_presets",
    "noise_shape",
    "optimize_noise",
    "register_method",
    "release_rewards",
    "select_group",
]
