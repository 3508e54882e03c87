"""The end of a run, and the choice of its best, by something else than the reward of the image itself."""

from typing import Any, Literal

import torch

from ...callbacks.early_stopping import EarlyStopping
from ...callbacks.held_out_reward import HeldOutReward
from ...rewards.contract.reward_sum import RewardSum, checked_reward_pairs, reward_weight_pairs
from ..objective import RewardObjective
from ..sampling.sample import Sample
from .objective import ViewedRewards

Stop = Literal["held_out", "views"]
PATIENCE = 10  # evaluations without a rise
JUDGING_VIEWS = 4


class StoppingRewards(ViewedRewards):
    """`ViewedRewards` whose run ends before it over-optimizes, and whose value is the mean over the views.

    Where the gradient is that of the image itself, its value is the mean over `JUDGING_VIEWS` views nevertheless, or
    with held-out rewards its own.

    Args:
        rewards: A `RewardSum`, or anything that it takes.
        views: The number of views that give the gradient.
        held_out: The rewards whose sum ends the run of an image once it no longer rises. `None` ends it once the loss
            no longer falls.
    """

    def __init__(self, rewards: Any, views: int, held_out: RewardSum | None = None) -> None:
        super().__init__(rewards, views)
        self.valued_by_views = views > 0
        self.held_out = None if held_out is None else RewardObjective(held_out)
        if self.held_out is None:
            self.callbacks = (EarlyStopping(PATIENCE),)
            return
        names = " + ".join(self.held_out.rewards.names)
        self.requires_prompt = self.requires_prompt or self.held_out.requires_prompt
        self.callbacks = (HeldOutReward(self.held_out.rewards, name=names, patience=PATIENCE),)

    def evaluate(self, sample: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, scores = super().evaluate(sample)
        if self.valued_by_views or self.held_out is not None:
            return loss, scores
        with torch.no_grad():
            mean, _ = self.mean_of_views(sample, JUDGING_VIEWS)
        return loss - loss.detach() - mean, scores

    def try_out(self, prompt: str, height: int, width: int, gradient: bool) -> None:
        super().try_out(prompt, height, width, gradient)
        if self.held_out is not None:
            self.held_out.try_out(prompt, height, width, False)


def check_stopping(stop: Stop | None, rewards: Any, held_out: Any) -> None:
    """Check the settings of a stopped run.

    Raises:
        TypeError, ValueError: For a held-out reward that is missing, without use, optimized too, or refused by
            `RewardSum`.
    """
    if (stop == "held_out") != (held_out is not None):
        raise ValueError(
            f'Expected `stop="held_out"` and `held_out` together, but got stop={stop!r} and held_out={held_out!r}. '
            'Pass both, such as `stop="held_out", held_out="vqascore"`, or neither.'
        )
    if held_out is None:
        return
    watched = [reward for reward, _ in checked_reward_pairs(held_out)]
    optimized = [reward for reward, weight in reward_weight_pairs(rewards, None) if weight]
    if both := [reward for reward in watched if any(reward is other or reward == other for other in optimized)]:
        raise ValueError(
            f"Expected a held-out reward that is not optimized, but {both[0]!r} is. Take another: it should share "
            "neither data nor models with the optimized ones."
        )
