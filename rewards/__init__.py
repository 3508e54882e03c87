"""Rewards: images and prompts in, one number per image out. Knows nothing of diffusion."""

from .clip_flant5 import CLIPFlanT5
from .clip_score import CLIPScore
from .color_channel import ColorChannel
from .registry import AutoReward, list_rewards, register_reward
from .reward import CallableReward, NonDifferentiableReward, NonFiniteReward, Reward, check_gradient
from .reward_sum import RewardSum, RewardSumOutput
from .soft_tifa import SoftTIFA, geneval2_atoms
from .transforms import ImageTransform, center_crop, longest_edge_pad, normalize, resize, shortest_edge
from .views import random_views
from .vlm_inputs import TokenizerAndImageProcessor
from .vqa_score import VQAScorer

__all__ = [
    "AutoReward",
    "CLIPFlanT5",
    "CLIPScore",
    "CallableReward",
    "ColorChannel",
    "ImageTransform",
    "NonDifferentiableReward",
    "NonFiniteReward",
    "Reward",
    "RewardSum",
    "RewardSumOutput",
    "SoftTIFA",
    "TokenizerAndImageProcessor",
    "VQAScorer",
    "center_crop",
    "check_gradient",
    "geneval2_atoms",
    "list_rewards",
    "longest_edge_pad",
    "normalize",
    "random_views",
    "register_reward",
    "resize",
    "shortest_edge",
]
