"""Set reward without a gradient above a target."""

from torch import Tensor

from .set_reward import SetReward


class HingedSetReward(SetReward):
    """Value of another set reward, with a gradient only below `target`.

    The gradient of `-weight * value` is that of the hinge `weight * max(0, target - value)`, the diversity term of It's
    Never Too Late, https://arxiv.org/abs/2601.00090, eq. 3, while the reported value is unchanged.

    Args:
        reward: Any set reward.
        target: τ_D, in the units of the reward.
    """

    def __init__(self, reward: SetReward, target: float) -> None:
        super().__init__(reward.features)
        self.reward, self.target = reward, float(target)
        self.name, self.range, self.default_features = reward.name, reward.range, reward.default_features

    def score(self, features: Tensor) -> Tensor:
        value = self.reward.score(features)
        return value.where(value < self.target, value.detach())

    def bounds(self, count: int) -> tuple[float, float] | None:
        return self.reward.bounds(count)
