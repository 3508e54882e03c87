"""Every registered reward with weights as a tiny random model of its real layout, built or written to disk."""

from collections.abc import Callable
from pathlib import Path

from tiny_blip_rewards import PUBLISHED_BLIP_REWARDS, TINY_BLIP_REWARDS
from tiny_clip_rewards import PUBLISHED_CLIP_REWARDS, TINY_CLIP_REWARDS
from tiny_siglip_rewards import PUBLISHED_SIGLIP_REWARDS, TINY_SIGLIP_REWARDS
from tiny_vlm_rewards import PUBLISHED_VLM_REWARDS, TINY_VLM_REWARDS

from noiseopt.rewards import AutoReward, Reward, list_rewards

# name -> what builds it from modules
TINY: dict[str, Callable[[], Reward]] = {
    **TINY_CLIP_REWARDS,
    **TINY_SIGLIP_REWARDS,
    **TINY_BLIP_REWARDS,
    **TINY_VLM_REWARDS,
}
# name -> what writes the same model under its published ids and in its published layout: `root/<namespace>/<name>`
PUBLISHED: dict[str, Callable[[Path], None]] = {
    **PUBLISHED_CLIP_REWARDS,
    **PUBLISHED_SIGLIP_REWARDS,
    **PUBLISHED_BLIP_REWARDS,
    **PUBLISHED_VLM_REWARDS,
}


def build_reward(name: str) -> Reward:
    """A reward with weights from tiny random modules; one without is loaded as a user would."""
    return TINY[name]() if name in TINY else AutoReward.from_pretrained(name)


def without_tiny_model() -> set[str]:
    """The registered names that need weights and have no tiny model here."""
    needing = set()
    for name in set(list_rewards()) - TINY.keys():
        try:
            AutoReward.from_pretrained(name, local_files_only=True)
        except OSError:
            needing.add(name)
    return needing
