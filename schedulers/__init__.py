"""Samplers of the initial noise, and x0 prediction for every image scheduler of diffusers."""

from .noise_samplers import (
    BandLimitedNoise,
    BlueNoise,
    CoupledNoise,
    NoiseSampler,
    PinkNoise,
    WhiteNoise,
    as_noise_sampler,
    list_noise_samplers,
    register_noise_sampler,
)
from .variations import Vary
from .x0_prediction import predict_x0

__all__ = [
    "BandLimitedNoise",
    "BlueNoise",
    "CoupledNoise",
    "NoiseSampler",
    "PinkNoise",
    "Vary",
    "WhiteNoise",
    "as_noise_sampler",
    "list_noise_samplers",
    "predict_x0",
    "register_noise_sampler",
]
