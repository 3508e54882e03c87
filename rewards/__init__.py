"""Rewards: images and prompts in, one number per image out. Knows nothing of diffusion."""

from .aesthetic import Aesthetic, AestheticHead, AestheticV1
from .clip_score import CLIPScore
from .color_channel import ColorChannel
from .hpsv2 import HPSv20, HPSv21
from .pick_score import PickScore
from .registry import AutoReward, list_rewards, register_reward
from .reward import CallableReward, NonDifferentiableReward, NonFiniteReward, Reward, check_gradient
from .reward_sum import RewardSum, RewardSumOutput
from .siglip import SigLIP, SigLIP2
from .transforms import ImageTransform, PadTransform, center_crop, longest_edge_pad, normalize, resize, shortest_edge
from .views import random_views

__all__ = [
    "Aesthetic",
    "AestheticHead",
    "AestheticV1",
    "AutoReward",
    "CLIPScore",
    "CallableReward",
    "ColorChannel",
    "HPSv20",
    "HPSv21",
    "ImageTransform",
    "NonDifferentiableReward",
    "NonFiniteReward",
    "PadTransform",
    "PickScore",
    "Reward",
    "RewardSum",
    "RewardSumOutput",
    "SigLIP",
    "SigLIP2",
    "center_crop",
    "check_gradient",
    "list_rewards",
    "longest_edge_pad",
    "normalize",
    "random_views",
    "register_reward",
    "resize",
    "shortest_edge",
]
