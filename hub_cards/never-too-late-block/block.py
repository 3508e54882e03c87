"""It's Never Too Late as a block of modular pipelines."""

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from .noiseopt_bundle import NeverTooLateMixin, NoiseBlock


class NeverTooLateBlock(NoiseBlock, ModularPipelineBlocks):
    """Block of modular pipelines that makes the images of one prompt a diverse set.

    See `NoiseBlock`, and `NeverTooLateMixin` for its inputs.
    """

    mixin = NeverTooLateMixin
