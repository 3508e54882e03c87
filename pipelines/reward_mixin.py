"""What pipelines share whose call takes rewards by name."""

from typing import Any

from ..rewards.reward_sum import RewardSum, reward_weight_pairs
from .noise_hook import NoiseOptimizationMixin
from .noise_optimizer import NoiseOptimizer


class RewardMixin(NoiseOptimizationMixin):
    """Makes a method of `rewards=` and its settings; rewards that have a name are loaded once per pipeline."""

    def method_on(
        self, method: Any, rewards: Any, settings: dict[str, Any], noise_optimizer: NoiseOptimizer | None
    ) -> NoiseOptimizer | None:
        """`method(rewards=..., **settings)`, or what was given instead; `None` leaves the stock pipeline.

        Raises:
            ValueError: settings without rewards, or rewards beside another method.
        """
        if rewards is None and settings:
            raise ValueError(
                f"Expected `rewards` beside {sorted(settings)}, but got none: there is nothing to optimise."
            )
        if rewards is not None and noise_optimizer is not None:
            raise ValueError("Expected `rewards` or `noise_optimizer`, but got both. Give the rewards to the method.")
        return noise_optimizer if rewards is None else method(rewards=self.load_rewards(rewards), **settings)

    def load_rewards(self, rewards: Any) -> RewardSum:
        """A `RewardSum` on the pipeline's device; what has a name is loaded at its first use and kept."""
        device = self._execution_device  # pyright: ignore[reportAttributeAccessIssue]
        kept = vars(self).setdefault("_loaded_rewards", {})
        pairs = reward_weight_pairs(rewards, None)
        known = [(kept.get(str(name), name), weight) for name, weight in pairs]
        total = RewardSum(known, normalization=getattr(rewards, "normalization", None), device=device)
        for (name, _), reward in zip(pairs, total.rewards, strict=True):
            if isinstance(name, str):
                kept[name] = reward
        return total
