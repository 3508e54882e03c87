"""The arguments of the CNO pipelines."""

from ..method_mixin import MethodMixin
from .method import CNO


class CNOMixin(MethodMixin, method=CNO, arguments=("steps", "gamma", "gradient")):
    """Optimizes the noises of each prompt's images for diversity in the call of a stock pipeline.

    Pass `num_images_per_prompt`: a prompt needs at least two images.

    Args:
        steps: Updates of CNO, each one more call of the denoiser for each image; 3 by default. 0 leaves the pipeline
            bit-identical to the stock class.
        gamma: The scale of the attraction's temperature, a number above 0 (smaller attracts more) or "auto", the
            default: the paper's closed form for the number of images.
        gradient: "frozen", the default, as in the paper; "full" differentiates the denoiser as the released code does.
    """
