"""CNO as a block of modular pipelines."""

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from .noiseopt_bundle import CNOMixin, NoiseBlock


class CNOBlock(NoiseBlock, ModularPipelineBlocks):
    """Block of modular pipelines that makes the images of one prompt differ.

    See `NoiseBlock`, and `CNOMixin` for its inputs.
    """

    mixin = CNOMixin
