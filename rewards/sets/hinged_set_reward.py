"""A set reward that is worth nothing more beyond a target."""

from torch import Tensor

from .set_reward import SetReward


class HingedSetReward(SetReward):
    """The value of another set reward, with its gradient only below `target`.

    So the gradient of `-weight * value` is that of the hinge `weight * max(0, target - value)`, the diversity term of
    It's Never Too Late, https://arxiv.org/abs/2601.00090, eq. 3, while the value that is reported stays what it is.

    Args:
        reward: Any set reward.
        target: τ_D, in its units.
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
