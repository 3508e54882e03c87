"""Every reward with weights is loaded by its name, as users do, from repositories of the published layout and id."""

import json
from pathlib import Path

import pytest
import torch
from fresh_process import FreshProcesses
from loopback_hub import LoopbackHub
from tiny_rewards import PUBLISHED, TINY, build_reward

PROGRAM = """
import json, sys, torch
from noiseopt.rewards import AutoReward
images, found = torch.load(sys.argv[1]), {}
for name in sys.argv[2:]:
    reward = AutoReward.from_pretrained(name)
    found[name] = reward(images, ["a red cube", "two green cars"]).tolist()
print(json.dumps(found))
"""


def test_each_reward_with_weights_on_the_hub_has_a_published_layout():
    assert PUBLISHED.keys() == {name for name in TINY if build_reward(name).default_checkpoint}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_names_load_what_is_published_under_their_default_checkpoints(
    hub: LoopbackHub, processes: FreshProcesses, tmp_path: Path
):
    for publish in PUBLISHED.values():
        publish(hub.root)
    images = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(5))
    torch.save(images, tmp_path / "images.pt")
    run = processes.run(PROGRAM, "images.pt", *PUBLISHED, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for name in PUBLISHED:
        expected = build_reward(name)(images, ["a red cube", "two green cars"])
        torch.testing.assert_close(torch.tensor(found[name]), expected, rtol=1e-4, atol=1e-4, msg=name)
