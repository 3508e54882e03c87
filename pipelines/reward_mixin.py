"""What pipelines share whose call takes rewards by name."""

from typing import Any

from ..rewards.contract.reward import check_reward_device
from ..rewards.contract.reward_sum import RewardSum, reward_weight_pairs
from .hook import NoiseOptimizationMixin
from .method import NoiseOptimizer


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
        if rewards is None:
            return noise_optimizer
        return method(rewards=self.load_rewards(rewards, settings.get("reward_device")), **settings)

    def load_rewards(self, rewards: Any, device: Any = None) -> RewardSum:
        """A `RewardSum` on a device, by default the pipeline's; what has a name is loaded at its first use and kept."""
        check_reward_device(device)
        kept = self.kept_on(device, "_loaded_rewards")
        pairs = reward_weight_pairs(rewards, None)
        known = [(kept.get(str(name), name), weight) for name, weight in pairs]
        device = device or self._execution_device  # pyright: ignore[reportAttributeAccessIssue]
        total = RewardSum(known, device=device)
        for (name, _), reward in zip(pairs, total.rewards, strict=True):
            if isinstance(name, str):
                kept[name] = reward
        return total

    def kept_on(self, device: Any, attribute: str) -> dict[str, Any]:
        """What this pipeline has loaded by name, for its own device or another one."""
        return vars(self).setdefault(attribute if device is None else f"{attribute}_on_{device}", {})
