"""ReNO as a block of modular pipelines."""

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from ..modular_block import NoiseBlock
from .mixin import ReNOMixin


class ReNOBlock(NoiseBlock, ModularPipelineBlocks):
    """Block of modular pipelines that optimizes the noise of each image for rewards.

    See `NoiseBlock`, and `ReNOMixin` for its inputs.
    """

    mixin = ReNOMixin
