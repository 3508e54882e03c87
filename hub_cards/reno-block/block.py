"""ReNO as a block of modular pipelines."""

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from .noiseopt_bundle import NoiseBlock, ReNOMixin


class ReNOBlock(NoiseBlock, ModularPipelineBlocks):
    """Block of modular pipelines that optimizes the noise of each image for rewards.

    See `NoiseBlock`, and `ReNOMixin` for its inputs.
    """

    mixin = ReNOMixin
