"""Rewards: images and prompts in, one number per image out. Knows nothing of diffusion."""

from .aesthetic import Aesthetic, AestheticHead, AestheticV1
from .blip_itm import BlipITC, BlipITM
from .blip_vqa import BlipVQA
from .clip_score import CLIPScore
from .color_channel import ColorChannel
from .color_histogram import SoftColorHistogram, histogram_distance
from .hpsv2 import HPSv20, HPSv21
from .image_reward import ImageRewardModel
from .pick_score import PickScore
from .pixel_criteria import Brightness, JPEGCompressibility, JPEGIncompressibility
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
    "BlipITC",
    "BlipITM",
    "BlipVQA",
    "Brightness",
    "CLIPScore",
    "CallableReward",
    "ColorChannel",
    "HPSv20",
    "HPSv21",
    "ImageRewardModel",
    "ImageTransform",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "NonDifferentiableReward",
    "NonFiniteReward",
    "PadTransform",
    "PickScore",
    "Reward",
    "RewardSum",
    "RewardSumOutput",
    "SigLIP",
    "SigLIP2",
    "SoftColorHistogram",
    "center_crop",
    "check_gradient",
    "histogram_distance",
    "list_rewards",
    "longest_edge_pad",
    "normalize",
    "random_views",
    "register_reward",
    "resize",
    "shortest_edge",
]
