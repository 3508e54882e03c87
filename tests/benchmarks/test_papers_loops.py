"""The papers' loops: exact rows arrive where the released loops do; arithmetic of the table."""

import sys
from pathlib import Path

import papers_loops  # pyright: ignore[reportMissingImports]
import pytest
import real_rewards  # pyright: ignore[reportMissingImports]
import torch
from real_rewards import reno_rewards  # pyright: ignore[reportMissingImports]

from noiseopt.rewards import CLIPScore, ImageRewardModel


def seen(losses, noise):
    watch = papers_loops.Watch(torch.device("cpu"))
    for loss in losses:
        watch.note(loss, torch.tensor(noise))
    return watch


def test_ratios_are_within_a_round():
    assert papers_loops.ratio([1.0, 3.0], [2.0, 3.0]) == "0.75 [0.50–1.00]"
    assert papers_loops.ratio([None], [None]) == "–"


FREED = """
import papers_loops, torch
from noiseopt.evaluation.measure import resident
with papers_loops.memory_goes_back():
    blocks = [torch.ones(2**18) for _ in range(100)]
    held = resident("VmRSS")
    blocks[:-1] = []
    print(held - resident("VmRSS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the resident memory is told by the kernel of Linux")
def test_what_is_freed_goes_back(processes, tmp_path):
    """In a fresh process: elsewhere freed blocks could be reused."""
    benchmarks = Path(papers_loops.__file__).parent
    run = processes.run(FREED, folder=tmp_path, path=[benchmarks, benchmarks.parent / "src"])
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(99, abs=5)


def test_deviation_counts_the_offset_of_losses_and_the_way_the_loop_went():
    losses, noise = papers_loops.deviation(seen([1.0, 2.0], [1.0]), seen([3.0, 4.5], [2.0]), torch.tensor([0.0]), 2.0)
    assert (losses, noise) == (0.5, 0.5)


def test_a_row_that_goes_another_way_is_an_error():
    table = {"ours": {"deviation": (0.001, 0.02)}, "not exact": {}}
    papers_loops.check_exact(table, 0.02)
    with pytest.raises(SystemExit, match="Expected ours to follow"):
        papers_loops.check_exact(table, 0.01)
    with pytest.raises(SystemExit):
        papers_loops.check_exact({"ours": {"deviation": (float("nan"), 0.0)}}, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reno", "cno"])
def test_exact_rows_arrive_where_the_released_loop_does(method, tmp_path, capsys):
    options = [
        "--method",
        method,
        "--rounds",
        "1",
        "--steps",
        "3",
        "--images",
        "2",
        "--output",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    table = papers_loops.main(options)
    exact = [row["deviation"] for row in table.values() if "deviation" in row]
    assert exact and max(max(pair) for pair in exact) < 1e-3
    assert all(row["processor"][0] > 0 and row["run"][0] > row["step"][0] > 0 for row in table.values())
    assert all(len(row["memory"]) == len(row["run"]) == 1 for row in table.values())
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in table)
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json"}


@pytest.mark.slow
def test_the_released_loop_reads_every_text_in_every_iteration_and_ours_once_a_run():
    pipe = papers_loops.load("tiny", torch.float32, torch.device("cpu"))
    rewards = reno_rewards(tiny=True)
    rows = papers_loops.reno_rows(pipe, rewards, 64, 3)
    calls: dict[str, int] = {}
    clip, bert = rewards.rewards[0].model, rewards.rewards[1].text_model
    parts = {"pipeline": pipe.text_encoder, "clip": clip.text_model, "bert": bert, "image": clip.vision_model}
    parts |= {"decoder": pipe.vae.decoder, "denoiser": pipe.unet}
    for name, part in parts.items():
        count = lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})  # noqa: E731
        part.register_forward_pre_hook(count)
    found = {}
    for name, row in rows.items():
        calls.clear()
        row.loop(papers_loops.Watch(torch.device("cpu")))
        found[name] = dict(calls)
    released, ours = found["released loop"], found['ReNO(mode="parity")']
    assert released == {"pipeline": 3, "clip": 9, "bert": 3, "image": 9, "decoder": 3, "denoiser": 3}
    assert ours == {**released, "pipeline": 1, "clip": 3}


def test_the_layers_of_hpsv2_alone_are_computed_again_in_the_backward_pass():
    rewards = reno_rewards(tiny=True, names=["hpsv2.1", "clipscore"])
    pixels, calls = torch.rand(1, 3, 224, 224).requires_grad_(), []
    layers = rewards.rewards[0].model.vision_model.encoder.layers
    layers[0].layer_norm1.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for reward in rewards.rewards:
        calls.clear()
        papers_loops.released_score(reward, pixels).sum().backward()
        counts.append(len(calls))
    assert counts == [2, 1]
    assert "forward" not in vars(layers[0])


def test_contrastive_loss_is_the_formula_of_the_paper():
    found, reference = (torch.nn.functional.normalize(torch.randn(3, 4, 2), dim=1) for _ in range(2))
    expected = []
    for i in range(3):
        for cell in range(2):
            own = (found[i, :, cell] @ reference[i, :, cell] / 0.1).exp()
            others = sum((found[i, :, cell] @ found[j, :, cell] / 0.1).exp() for j in range(3) if j != i)
            expected.append(-(own / (own + others)).log())
    torch.testing.assert_close(papers_loops.contrastive_loss(found, reference), torch.stack(expected).mean())


def test_real_rewards_have_the_published_number_of_parameters():
    with torch.device("meta"):
        clip, blip = real_rewards.clip(tiny=False), real_rewards.image_reward(tiny=False)
    assert sum(p.numel() for p in clip.parameters()) == CLIPScore.parameter_count
    assert sum(p.numel() for p in blip.parameters()) == pytest.approx(ImageRewardModel.parameter_count, rel=1e-3)
    shared = reno_rewards(tiny=True).rewards
    assert shared[0].model is shared[2].model is shared[3].model
