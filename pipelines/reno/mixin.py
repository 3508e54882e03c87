"""The arguments of the ReNO pipelines."""

from ..method_mixin import MethodMixin
from .method import ReNO


class ReNOMixin(MethodMixin, method=ReNO, arguments=("rewards", "steps", "mode"), target="rewards"):
    """Optimizes the initial noise for rewards in the call of a stock pipeline.

    Args:
        rewards: A name, Hub id or folder (`"clipscore"`), a callable `(images, prompts) -> (B,)`, a dict of these to
            weights (`{"clipscore": 1.0, "red": 0.1}`), a list of (reward, weight), `"reno"` for the rewards and weights
            of the paper, or `"auto"` for weights by the kind of the prompt. `None` leaves the pipeline bit-identical to
            the stock class.
        steps: Evaluations of ReNO, 50 by default.
        mode: "default", or "parity" for the released loop step by step.
    """
