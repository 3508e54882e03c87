"""Rewards: images and prompts in, one number per image out. Knows nothing of diffusion."""

from .aesthetic import Aesthetic, AestheticHead, AestheticV1
from .auto_features import AutoFeatures
from .black_box import BlackBox
from .blip_itm import BlipITC, BlipITM
from .blip_vqa import BlipVQA
from .clip_flant5 import CLIPFlanT5
from .clip_score import CLIPScore
from .color_channel import ColorChannel
from .color_histogram import ColorHistogramFeatures, SoftColorHistogram, histogram_distance
from .cosine_kernel import cosine_kernel
from .dpp import DPP, DPPPatch
from .dreamsim_features import DreamSimDINOFeatures, DreamSimFeatures
from .features import Features, list_features, register_features
from .hpsv2 import HPSv20, HPSv21
from .image_detail import Complexity, Sharpness
from .image_features import NEVER_TOO_LATE_TRANSFORM, CLIPFeatures, DINOv2Features, DINOv2PatchFeatures, ImageFeatures
from .image_reward import ImageRewardModel
from .lpips_features import LPIPSAlexFeatures, LPIPSFeatures
from .pairwise_distance import PairwiseDistance, cosine_distance, l2_distance, squared_l2_distance
from .pick_score import PickScore
from .pixel_criteria import Brightness, JPEGCompressibility, JPEGIncompressibility
from .registry import AutoReward, list_rewards, register_reward
from .reward import CallableReward, NonDifferentiableReward, NonFiniteReward, Reward, check_gradient
from .reward_sum import RewardSum, RewardSumOutput
from .set_reward import PairwiseDiversity, SetReward, find_set_reward, list_set_rewards, register_set_reward
from .set_reward_sum import SetRewardSum, SetRewardSumOutput, join_features
from .siglip import SigLIP, SigLIP2
from .soft_tifa import SoftTIFA, geneval2_atoms
from .tiny_image import TinyImage
from .transforms import ImageTransform, PadTransform, center_crop, longest_edge_pad, normalize, resize, shortest_edge
from .vendi import Vendi, VendiOrder2, VendiOrderInfinity, vendi_score
from .views import random_views
from .vlm_inputs import TokenizerAndImageProcessor
from .vqa_score import VQAScorer

__all__ = [
    "Aesthetic",
    "AestheticHead",
    "AestheticV1",
    "AutoFeatures",
    "AutoReward",
    "BlackBox",
    "BlipITC",
    "BlipITM",
    "BlipVQA",
    "Brightness",
    "CLIPFeatures",
    "CLIPFlanT5",
    "CLIPScore",
    "CallableReward",
    "ColorChannel",
    "ColorHistogramFeatures",
    "Complexity",
    "DINOv2Features",
    "DINOv2PatchFeatures",
    "DPP",
    "DPPPatch",
    "DreamSimDINOFeatures",
    "DreamSimFeatures",
    "Features",
    "HPSv20",
    "HPSv21",
    "ImageFeatures",
    "ImageRewardModel",
    "ImageTransform",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "LPIPSAlexFeatures",
    "LPIPSFeatures",
    "NEVER_TOO_LATE_TRANSFORM",
    "NonDifferentiableReward",
    "NonFiniteReward",
    "PadTransform",
    "PairwiseDistance",
    "PairwiseDiversity",
    "PickScore",
    "Reward",
    "RewardSum",
    "RewardSumOutput",
    "SetReward",
    "SetRewardSum",
    "SetRewardSumOutput",
    "Sharpness",
    "SigLIP",
    "SigLIP2",
    "SoftColorHistogram",
    "SoftTIFA",
    "TinyImage",
    "TokenizerAndImageProcessor",
    "VQAScorer",
    "Vendi",
    "VendiOrder2",
    "VendiOrderInfinity",
    "center_crop",
    "check_gradient",
    "cosine_distance",
    "cosine_kernel",
    "find_set_reward",
    "geneval2_atoms",
    "histogram_distance",
    "join_features",
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
    "vendi_score",
]
