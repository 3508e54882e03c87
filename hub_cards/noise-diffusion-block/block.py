"""Noise Diffusion as a block of modular pipelines."""

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from .noiseopt_bundle import NoiseBlock, NoiseDiffusionMixin


class NoiseDiffusionBlock(NoiseBlock, ModularPipelineBlocks):
    """Block of modular pipelines that chooses the noise by the score of a vision-language model.

    See `NoiseBlock`, and `NoiseDiffusionMixin` for its inputs.
    """

    mixin = NoiseDiffusionMixin
