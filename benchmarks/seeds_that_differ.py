"""What makes seeds differ, at what cost in right images and in seconds: noise optimization and the tools to beat.

python benchmarks/seeds_that_differ.py --prompts held-out --limit 60 --output found.json --plot found.png
python benchmarks/seeds_that_differ.py --model guided --prompts held-out --limit 60 --output guided.json

On a model of one step, callbacks cannot act, so that there are no rows for them, and `DiversityBoost` must not blur.
Held out are the judge and DINOv2. Run a command again with the same `--output` to resume.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from never_too_late import Budget, group, ours
from sets import COST, Bench, Report, Row, parser_of, run

from noiseopt import CNO, shapes_world
from noiseopt.callbacks import CADS, ParticleGuidance
from noiseopt.evaluation.bootstrap import bootstrap, paired_bootstrap
from noiseopt.evaluation.figures import label_points
from noiseopt.evaluation.plane import pareto_front
from noiseopt.pipelines import DiversityBoost, EmbeddingNoise
from noiseopt.recipes import RECIPES

STRENGTHS = (4.0, 8.0, 12.0, 20.0)  # of the embedding noise
RATES = {"turbo": 0.04, "guided": 0.04}  # of CNO
MEASURES = ("MSS", "Vendi", "grounds", "positions", "right", "reward", "seconds")
CLOSE = 0.03  # similarities that count as equal
SEARCH, STEPS = 26, 10  # of It's Never Too Late on the student
CANDIDATES = (104, 24)  # of group selection, per set: those of that search, and fewer where each takes many steps


def embedding_noise(strength: float, generator: list[torch.Generator]) -> EmbeddingNoise:
    return EmbeddingNoise(strength=strength, generator=generator)


def cno(model: str, bench: Bench) -> CNO:
    return CNO(**{**RECIPES["cno"].settings, "learning_rate": RATES.get(model, 0.04)})


def rows(model: str) -> list[Row]:
    """Return plain sampling, the tools to beat, and noise optimization, as far as a model can run them."""
    several = shapes_world.MODELS[model].call["num_inference_steps"] > 1
    boost: dict[str, Any] = {} if several else {"attenuation": 0.0}
    tools = {f"embedding noise {strength:g}": functools.partial(embedding_noise, strength) for strength in STRENGTHS}
    found = [Row("plain"), *(Row(name, steer=tool) for name, tool in tools.items())]
    found.append(Row("DiversityBoost", steer=lambda generator: DiversityBoost(generator=generator, **boost)))
    if several:
        found.append(Row("CADS", steer=lambda generator: CADS(generator=generator)))
        found.append(Row("particle guidance", steer=lambda generator: ParticleGuidance()))
    found += [Row("pink", noise="pink"), Row("coupled", noise="coupled")]
    found.append(Row("CNO", functools.partial(cno, model)))
    found.append(Row(f"group selection from {CANDIDATES[several]}", group(CANDIDATES[several])))
    if not several:
        found.append(Row("It's Never Too Late", ours(Budget(SEARCH, STEPS))))
        found.append(Row("group selection, same time", group(), time_of="It's Never Too Late"))
    return found


def beside_embedding_noise(found: Report, row: Row) -> str:
    """Compare a row with the weakest embedding noise whose images are as different, but for `CLOSE`."""
    mss = float(found.of(row.name, "MSS").mean())
    tools = [each for each in found.rows if each.name.startswith("embedding noise")]
    for tool in tools:
        if float(found.of(tool.name, "MSS").mean()) <= mss + CLOSE:
            change = paired_bootstrap(found.of(row.name, "right"), found.of(tool.name, "right"))
            low, value, high = (100 * each for each in (change.low, change.value, change.high))
            return f"{row.name} against {tool.name}: right {value:+.0f} points [{low:+.0f}, {high:+.0f}]"
    return f"{row.name}: MSS {mss:.2f}, which no embedding noise here reaches"


def points(found: Report) -> list[tuple[float, float]]:
    """Return each row's diversity, 1 − MSS, and the percentage of right images."""
    return [
        (1 - float(found.of(row.name, "MSS").mean()), 100 * float(found.of(row.name, "right").mean()))
        for row in found.rows
    ]


def plot(found: Report, path: Path) -> None:
    """Plot quality against diversity, with the Pareto front, and the seconds of a set in the labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=160, layout="constrained")
    axes, places = figure.subplots(), points(found)
    front = sorted(place for place, best in zip(places, pareto_front(places), strict=True) if best)
    axes.plot(*zip(*front, strict=True), color="#afb8c1", linewidth=1.5, zorder=1, label="Pareto front")
    for row, (x, y) in zip(found.rows, places, strict=True):
        color = "#0969da" if row.make else "#bc4c00" if row.steer else "#57606a"
        for metric, scale in (("MSS", -1), ("right", 100)):
            spread = bootstrap(found.of(row.name, metric))
            low, high = sorted((scale * spread.low, scale * spread.high))
            ends = ([1 + low, 1 + high], [y, y]) if metric == "MSS" else ([x, x], [low, high])
            axes.plot(*ends, color=color, alpha=0.35, linewidth=1.2)
        axes.plot(x, y, "o", color=color, markersize=7)
    axes.margins(0.1)
    axes.autoscale_view()
    seconds = (float(found.of(row.name, "seconds").mean()) for row in found.rows)
    label_points(axes, places, [f"{row.name}, {each:.2g} s" for row, each in zip(found.rows, seconds, strict=True)])
    axes.set_xlabel("diversity: 1 − MSS of held-out features", size=9)
    axes.set_ylabel("right by the judge, %", size=9)
    axes.grid(color="#d0d7de", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = parser_of("What makes seeds differ.", "turbo", images=4, limit=24)
    options = parser.parse_args(arguments)
    found = run(options, rows(options.model), "never_too_late")
    print(found.table(MEASURES), found.table(COST), sep="\n\n")
    print("", *(beside_embedding_noise(found, row) for row in found.rows if row.make), sep="\n")
    best = [row.name for row, on in zip(found.rows, pareto_front(points(found)), strict=True) if on]
    print(f"\nPareto front: {', '.join(best)}")
    if options.plot:
        plot(found, options.plot)
    return found


if __name__ == "__main__":
    main()
