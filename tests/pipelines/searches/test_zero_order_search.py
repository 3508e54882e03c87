"""Zero-order search: where neighbors are, and which noise is searched around, retold step by step."""

import pytest
import torch
from problems import redness
from tiny_pipelines import SIZE, tiny_pipeline

from noiseopt import ZeroOrderSearch, optimize_noise
from noiseopt.pipelines.searches.zero_order_search import neighbor

CALL = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double().flatten(), other.double().flatten()
    return float(one @ other / (one.norm() * other.norm()))


@pytest.mark.parametrize("cos", [0.0, 0.5, 0.95, 0.9999])
def test_a_neighbor_has_exactly_the_norm_of_the_pivot_and_the_cosine_to_it(cos):
    pivot, draw = (
        gaussian(3, 4, 8, 8) * torch.tensor([1.0, 5.0, 1e-3])[:, None, None, None],
        gaussian(3, 4, 8, 8, seed=1),
    )
    found = neighbor(pivot, draw, cos)
    for row in range(3):
        assert cosine(found[row], pivot[row]) == pytest.approx(cos, abs=1e-14)
        assert found[row].norm().item() == pytest.approx(pivot[row].norm().item(), rel=1e-14)


def test_the_norm_stays_over_many_rounds_in_float32():
    noise = gaussian(1, 4, 64, 64).float()
    norm = noise.norm().item()
    for seed in range(1, 201):
        noise = neighbor(noise, gaussian(1, 4, 64, 64, seed=seed).float(), 0.95)
    assert noise.norm().item() == pytest.approx(norm, rel=1e-4)


def test_directions_are_uniform_at_a_right_angle():
    """Two neighbors have the mean cosine λ² to each other: w and w' are independent, with mean zero."""
    pivot, count, cos = gaussian(1, 1, 4, 6), 4000, 0.8
    one, other = (
        neighbor(pivot.expand(count, -1, -1, -1), gaussian(count, 1, 4, 6, seed=seed), cos) for seed in (1, 2)
    )
    cosines = (one * other).flatten(1).sum(1) / pivot.norm() ** 2
    spread = (1 - cos**2) / 23**0.5  # w·w' has the variance 1 / (d − 1)
    assert cosines.mean().item() == pytest.approx(cos**2, abs=4 * spread / count**0.5)
    assert cosines.std().item() == pytest.approx(spread, rel=0.05)


def trace(prompts, seeds, rewards=redness, **settings):
    """The result, and for each image its noises and losses, step by step."""
    steps, streams = [], [torch.Generator().manual_seed(seed) for seed in seeds]
    result = optimize_noise(
        tiny_pipeline("sd"),
        prompts,
        ZeroOrderSearch(rewards=rewards, **settings),
        generator=streams,
        callbacks=lambda state: steps.append((state.noise, state.loss)),
        **CALL,
    )
    return result, [[(noise[row], loss[row].item()) for noise, loss in steps] for row in range(len(seeds))]


def retold(seen, count: int, cos: float, restart: bool) -> tuple[int, int]:
    """Follow the search of one image by the definition, and see that each noise is what it has to be.

    Returns:
        Finished rounds, and those without progress.
    """
    pivot, round_of, rounds, stuck = None, [], 0, 0
    for index, (noise, loss) in enumerate(seen):
        if pivot is None:
            assert all(abs(cosine(noise, earlier)) < 0.3 for earlier, _ in seen[:index])
            pivot, round_of = (noise, loss), []
            continue
        assert cosine(noise, pivot[0]) == pytest.approx(cos, abs=1e-5)
        assert noise.norm().item() == pytest.approx(pivot[0].norm().item(), rel=1e-5)
        round_of.append((noise, loss))
        if len(round_of) == count:
            rounds, best = rounds + 1, min(round_of, key=lambda each: each[1])
            better = best[1] < pivot[1]
            stuck += not better
            pivot = best if better else None if restart else pivot
            round_of = []
    return rounds, stuck


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize(("count", "cos"), [(1, 0.9), (3, 0.95)])
def test_the_best_neighbor_becomes_the_pivot_of_each_image_by_itself(count, cos, restart):
    """Images come to restarts at steps of their own."""
    result, seen = trace(["a", "b", "c"], [1, 2, 3], neighbors=count, cosine=cos, restart=restart, steps=23)
    told = [retold(each, count, cos, restart) for each in seen]
    report = result.reports["zero_order_search"]
    assert list(zip(report["rounds"], report["rounds_without_progress"], strict=True)) == told
    assert sum(stuck for _, stuck in told) > 0 and any(rounds > stuck for rounds, stuck in told)
    assert result.best_loss.tolist() == [min(loss for _, loss in each) for each in seen]


def test_where_nothing_is_better_every_round_begins_anew():
    """The plain result is the best, and of equals the first is returned."""

    def flat(images, prompts):
        return torch.zeros(len(images))

    result, ((*noises,),) = trace(["a"], [0], flat, neighbors=2, steps=10)
    norms = [noise.norm().item() for noise, _ in noises]
    for start in range(0, 9, 3):  # N neighbors, and the fresh noise before them
        assert norms[start + 1 : start + 3] == pytest.approx([norms[start]] * 2, rel=1e-5)
    assert len({round(norm, 3) for norm in norms}) == 4
    assert result.reports["zero_order_search"] == {"rounds": [3], "rounds_without_progress": [3]}
    assert result.best_step.item() == 0
    result, ((*noises,),) = trace(["a"], [0], flat, neighbors=2, steps=10, restart=False)
    assert len({round(noise.norm().item(), 3) for noise, _ in noises}) == 1
    assert result.reports["zero_order_search"]["rounds"] == [4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbors": 0}, "`neighbors` to be an integer in"),
        ({"neighbors": 2.0}, "`neighbors` to be an integer"),
        ({"cosine": 1.0}, r"`cosine` to be a number in"),
        ({"cosine": -0.1}, "`cosine`"),
        ({"steps": 0}, "`steps`"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        trace(["a"], [0], **settings)
