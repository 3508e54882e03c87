import random

import pytest
import torch

from noiseopt import shapes_world


@pytest.fixture(scope="session")
def pictures() -> tuple[torch.Tensor, list[str]]:
    """128 rendered images, (128, 3, 128, 128) in [0, 1], and a true caption of each."""
    rng = random.Random(5)
    scenes = [shapes_world.sample_scene(rng) for _ in range(128)]
    return shapes_world.render(scenes, torch.Generator().manual_seed(5)), [shapes_world.caption(s, rng) for s in scenes]
