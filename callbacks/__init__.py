"""Callbacks that observe or stop a noise optimization, and callbacks that steer the denoising of a stock pipeline."""

from .cads import CADS
from .denoising_callback import DenoisingCallback
from .early_stopping import EarlyStopping, LossThreshold, TimeBudget
from .held_out_reward import HeldOutReward
from .interval_guidance import IntervalGuidance
from .noise_callback import NoiseCallback
from .noise_state import Best, NoiseState
from .particle_guidance import ParticleGuidance
from .progress import ProgressBar
from .recording import History, StepImages

__all__ = [
    "CADS",
    "Best",
    "DenoisingCallback",
    "EarlyStopping",
    "HeldOutReward",
    "History",
    "IntervalGuidance",
    "LossThreshold",
    "NoiseCallback",
    "NoiseState",
    "ParticleGuidance",
    "ProgressBar",
    "StepImages",
    "TimeBudget",
]
