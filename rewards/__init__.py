"""Rewards: functions of images and prompts with one score per image, independent of any diffusion model."""

from .contract.black_box import BlackBox
from .contract.prompt_kind import prompt_kind
from .contract.registry import AutoReward, list_rewards, register_reward
from .contract.reward import CallableReward, NonDifferentiableReward, NonFiniteReward, Reward, check_gradient
from .contract.reward_sum import RewardSum, RewardSumOutput
from .contract.transforms import (
    ImageTransform,
    PadTransform,
    center_crop,
    longest_edge_pad,
    normalize,
    resize,
    shortest_edge,
)
from .contract.weight_by_kind import WeightByKind
from .features.auto_features import AutoFeatures
from .features.color_histogram import ColorHistogramFeatures, SoftColorHistogram, histogram_distance
from .features.dreamsim_features import DreamSimDINOFeatures, DreamSimFeatures
from .features.features import Features, list_features, register_features
from .features.image_features import (
    NEVER_TOO_LATE_TRANSFORM,
    CLIPFeatures,
    DINOv2Features,
    DINOv2PatchFeatures,
    ImageFeatures,
)
from .features.lpips_features import LPIPSAlexFeatures, LPIPSFeatures
from .features.pe_spatial_features import PESpatialFeatures
from .features.sscd_features import SSCDFeatures
from .features.tiny_image import TinyImage
from .pixels.color_channel import ColorChannel
from .pixels.image_detail import Complexity, Sharpness
from .pixels.pixel_criteria import Brightness, JPEGCompressibility, JPEGIncompressibility
from .preference.aesthetic import Aesthetic, AestheticHead, AestheticV1
from .preference.blip_itm import BlipITC, BlipITM
from .preference.clip_score import CLIPScore
from .preference.hpsv2 import HPSv20, HPSv21
from .preference.image_reward import ImageRewardModel
from .preference.pick_score import PickScore
from .preference.siglip import SigLIP, SigLIP2
from .sets.cosine_kernel import cosine_kernel
from .sets.dpp import DPP, DPPPatch
from .sets.pairwise_distance import PairwiseDistance, cosine_distance, l2_distance, squared_l2_distance
from .sets.set_reward import PairwiseDiversity, SetReward, find_set_reward, list_set_rewards, register_set_reward
from .sets.set_reward_sum import SetRewardSum, SetRewardSumOutput, join_features
from .sets.vendi import Vendi, VendiOrder2, VendiOrderInfinity, vendi_score
from .vlm.blip_vqa import BlipVQA
from .vlm.clip_flant5 import CLIPFlanT5
from .vlm.soft_tifa import SoftTIFA, geneval2_atoms
from .vlm.vlm_inputs import TokenizerAndImageProcessor
from .vlm.vqa_score import VQAScorer

__all__ = [
    "DPP",
    "NEVER_TOO_LATE_TRANSFORM",
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
    "NonDifferentiableReward",
    "NonFiniteReward",
    "PESpatialFeatures",
    "PadTransform",
    "PairwiseDistance",
    "PairwiseDiversity",
    "PickScore",
    "Reward",
    "RewardSum",
    "RewardSumOutput",
    "SSCDFeatures",
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
    "WeightByKind",
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
    "prompt_kind",
    "register_features",
    "register_reward",
    "register_set_reward",
    "resize",
    "shortest_edge",
    "squared_l2_distance",
    "vendi_score",
]
