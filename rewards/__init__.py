"""Rewards: images and prompts in, one number per image out. Knows nothing of diffusion."""

from .auto_features import AutoFeatures
from .clip_score import CLIPScore
from .color_channel import ColorChannel
from .dreamsim_features import DreamSimDINOFeatures, DreamSimFeatures
from .features import Features, list_features, register_features
from .image_features import (
    NEVER_TOO_LATE_TRANSFORM,
    CLIPFeatures,
    DINOv2Features,
    DINOv2PatchFeatures,
    ImageFeatures,
)
from .lpips_features import LPIPSAlexFeatures, LPIPSFeatures
from .pairwise_distance import PairwiseDistance, cosine_distance, l2_distance, squared_l2_distance
from .registry import AutoReward, list_rewards, register_reward
from .reward import CallableReward, NonDifferentiableReward, NonFiniteReward, Reward, check_gradient
from .reward_sum import RewardSum, RewardSumOutput
from .set_reward import PairwiseDiversity, SetReward, find_set_reward, list_set_rewards, register_set_reward
from .tiny_image import TinyImage
from .transforms import ImageTransform, center_crop, longest_edge_pad, normalize, resize, shortest_edge
from .views import random_views

__all__ = [
    "AutoFeatures",
    "AutoReward",
    "CLIPFeatures",
    "CLIPScore",
    "CallableReward",
    "ColorChannel",
    "DINOv2Features",
    "DINOv2PatchFeatures",
    "DreamSimDINOFeatures",
    "DreamSimFeatures",
    "Features",
    "ImageFeatures",
    "ImageTransform",
    "LPIPSAlexFeatures",
    "LPIPSFeatures",
    "NEVER_TOO_LATE_TRANSFORM",
    "NonDifferentiableReward",
    "NonFiniteReward",
    "PairwiseDistance",
    "PairwiseDiversity",
    "Reward",
    "RewardSum",
    "RewardSumOutput",
    "SetReward",
    "TinyImage",
    "center_crop",
    "check_gradient",
    "cosine_distance",
    "find_set_reward",
    "l2_distance",
    "list_features",
    "list_rewards",
    "list_set_rewards",
    "longest_edge_pad",
    "normalize",
    "random_views",
    "register_features",
    "register_reward",
    "register_set_reward",
    "resize",
    "shortest_edge",
    "squared_l2_distance",
]
