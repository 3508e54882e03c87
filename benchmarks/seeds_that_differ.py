"""What makes seeds differ, at what cost in right images and in seconds: noise optimization and the tools to beat.

python benchmarks/seeds_that_differ.py --prompts held-out --limit 60 --output found.json --plot found.png
python benchmarks/seeds_that_differ.py --model guided --prompts held-out --limit 60 --output guided.json

On a model of one step, callbacks cannot act, so that there are no rows for them, and `DiversityBoost` must not blur.
Held out are the judge and DINOv2. Run a command again with the same `--output` to resume.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from never_too_late import Budget, group, ours
from sets import COST, Bench, Report, Row, parser_of, run

from noiseopt import CNO, shapes_world
from noiseopt.callbacks import CADS, ParticleGuidance
from noiseopt.evaluation.bootstrap import paired_bootstrap
from noiseopt.pipelines import DiversityBoost, EmbeddingNoise
from noiseopt.recipes import RECIPES

STRENGTHS = (4.0, 8.0, 20.0)  # of the embedding noise
RATES = {"turbo": 0.04, "guided": 0.04}  # of CNO
MEASURES = ("MSS", "Vendi", "patches", "positions", "right", "reward", "seconds")
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
    """Compare a row with the weakest embedding noise whose images are as different."""
    mss = float(found.of(row.name, "MSS").mean())
    tools = [each for each in found.rows if each.name.startswith("embedding noise")]
    for tool in tools:
        if float(found.of(tool.name, "MSS").mean()) <= mss:
            change = paired_bootstrap(found.of(row.name, "right"), found.of(tool.name, "right"))
            low, value, high = (100 * each for each in (change.low, change.value, change.high))
            return f"{row.name} against {tool.name}: right {value:+.0f} points [{low:+.0f}, {high:+.0f}]"
    return f"{row.name}: MSS {mss:.2f}, which no embedding noise here reaches"


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = parser_of("What makes seeds differ.", "turbo", images=4, limit=24)
    options = parser.parse_args(arguments)
    found = run(options, rows(options.model), "never_too_late")
    print(found.table(MEASURES), found.table(COST), sep="\n\n")
    print("", *(beside_embedding_noise(found, row) for row in found.rows if row.make), sep="\n")
    return found


if __name__ == "__main__":
    main()
