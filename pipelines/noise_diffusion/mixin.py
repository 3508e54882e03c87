"""The arguments of the Noise Diffusion pipelines."""

from ..method_mixin import MethodMixin
from .method import NoiseDiffusion


class NoiseDiffusionMixin(
    MethodMixin, method=NoiseDiffusion, arguments=("rewards", "steps", "selection"), target="rewards"
):
    """Chooses the initial noise by a scorer in the call of a stock pipeline.

    Args:
        rewards: The scorer, in [0, 1]: `"vqascore"`, the Hub id or folder of a vision-language model, or any callable
            `(images, prompts) -> (B,)`. Other rewards need `method_kwargs={"score_range": (low, high)}`. `None` leaves
            the pipeline bit-identical to the stock class.
        steps: Images that are sampled and scored, 51 by default: the baseline and 50 rounds.
        selection: "pool", the default and the paper's, "exact" or "random".
    """
