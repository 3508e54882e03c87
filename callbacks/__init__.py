"""Callbacks: what may watch, steer or stop a noise optimisation."""

from .early_stopping import EarlyStopping, LossThreshold, TimeBudget
from .held_out_reward import HeldOutReward
from .noise_callback import NoiseCallback
from .noise_state import NoiseState
from .progress import ProgressBar
from .recording import History, StepImages

__all__ = [
    "EarlyStopping",
    "HeldOutReward",
    "History",
    "LossThreshold",
    "NoiseCallback",
    "NoiseState",
    "ProgressBar",
    "StepImages",
    "TimeBudget",
]
