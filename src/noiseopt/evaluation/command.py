"""The command `noiseopt evaluate` and its defaults."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import add_device, make_folder, positive, require_plots
from ..shown_text import shown_lines

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .plan import Plan

FIRST_LOOK = 12  # default number of prompts
DESCRIPTION = """\
Evaluate noise optimization: every method runs on every model and prompt from the same initial noises, and is compared
with two controls: plain sampling, and best-of-N by the same reward in the same wall-clock time. Without arguments: ReNO
on the embedded one-step model, offline, in a few minutes.
"""

EPILOG = """\
results, in the folder given by --output:
  table.md, table.csv    accuracy by the judge (shapes world), rewards, diversity of the images of a prompt, statistics
                         of the noise, and paired differences, with 95% bootstrap intervals over prompts
  cost.md, cost.csv      seconds, model calls and memory, which vary between runs
  results.json           everything, including the numbers of each image
  *.png                  accuracy (or rewards), quality against diversity with the Pareto front, reward against seconds,
                         spectrum of the noise, images side by side
  units/                 finished units: noise, images and numbers of each model, method and prompt

After an interruption the same command continues. A command with more methods, models or prompts adds to the folder
what is missing. One command writes to a folder at a time. To split the prompts over processes or GPUs, with the same
table:
  accelerate launch -m noiseopt evaluate ...
N of best-of-N is measured once, before the comparison, and stored in the folder. The table depends on it: to reproduce
a table elsewhere, pass the printed N as --best-of.

examples:
  noiseopt evaluate --method reno --method "cno:gradient=full,gamma=1.0" --limit 48
  noiseopt evaluate --model turbo --model guided --prompts held-out --seeds 4 --output results
  noiseopt evaluate --method cno --noise-sampler white --noise-sampler pink --features dinov2 --features clip --seeds 4
  noiseopt evaluate --model stabilityai/sdxl-turbo --call num_inference_steps=1,guidance_scale=0.0 \\
      --prompts prompts.txt --reward clipscore --watch imagereward
"""


def add_evaluate(commands) -> None:
    """Add the parser of the command to `commands`, the result of `add_subparsers`."""
    parser = commands.add_parser(
        "evaluate",
        help="compare methods with plain sampling and with best-of-N at equal time",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_subject(parser)
    add_measures(parser)
    add_machine(parser)
    parser.set_defaults(run=lambda arguments: evaluate(arguments, parser))


def add_subject(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--model",
        action="append",
        dest="models",
        metavar="NAME",
        help="embedded model (turbo, guided, sdxl, sdxl-turbo, sd3), Hub id or folder; repeatable (default: turbo)",
    )
    group.add_argument(
        "--method",
        action="append",
        dest="methods",
        metavar="NAME[:SETTING=VALUE,...]",
        help="method with settings, such as 'reno:steps=20' or 'reno:noise_sampler=pink', or what steers the denoising "
        "steps: cads, particle_guidance, interval_guidance, reward_guidance, embedding_noise, diversity_boost; "
        "repeatable (default: reno)",
    )
    group.add_argument(
        "--noise-sampler",
        action="append",
        dest="noise_samplers",
        metavar="NAME[:SETTING=VALUE,...]",
        help="distribution of the initial noise, with which plain sampling and each method run too: white, pink, blue, "
        "band_limited, coupled, or with settings 'pink:alpha=0.3'; repeatable (default: white)",
    )
    group.add_argument(
        "--prompts",
        metavar="SOURCE",
        help="train, validation or held-out of the shapes world, or a file: text, CSV, TSV, JSON, JSON lines or a "
        "benchmark's format (default: validation)",
    )
    group.add_argument(
        "--limit",
        type=positive,
        metavar="COUNT",
        help="use only the first prompts (default: all; 12 without --prompts)",
    )
    group.add_argument("--seeds", type=positive, default=2, help="images per prompt, evaluated as a set (default: 2)")
    group.add_argument(
        "--call",
        default="",
        metavar="NAME=VALUE,...",
        help="arguments of the pipeline's call, such as num_inference_steps=1,guidance_scale=0.0, or a noise_sampler "
        "for all methods; embedded models have defaults",
    )


def add_measures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurements")
    group.add_argument(
        "--reward",
        action="append",
        dest="rewards",
        metavar="NAME[=WEIGHT]",
        help="reward that the methods and best-of-N optimize: a name in `noiseopt rewards`, a Hub id, a folder, or "
        "reno for all rewards of that paper; repeatable (default for embedded models: the embedded clip)",
    )
    group.add_argument(
        "--watch",
        action="append",
        dest="watched",
        metavar="NAME",
        help="reward that is only measured; repeatable (default for embedded models: vqa)",
    )
    group.add_argument(
        "--features",
        action="append",
        metavar="NAME",
        help="embedding for similarity, Vendi score and coverage: dinov2, dinov2_patch, clip, dreamsim, pe_spatial, "
        "Hub id, folder (for sscd, that of its weights) or none; others, such as lpips, add their own similarity and "
        "Vendi score, or mean distance; repeatable (default: facebook/dinov2-base; the embedded dinov2 if all models "
        "are embedded)",
    )
    group.add_argument(
        "--references",
        metavar="FOLDER",
        help="reference images for coverage, pooled over all prompts (default: renders of each shapes world prompt)",
    )
    group.add_argument("--best-of", type=positive, metavar="N", help="N of best-of-N (default: measured)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    add_device(group)
    group.add_argument(
        "--threads", type=positive, default=1, help="CPU threads per process; affects the last digits (default: 1)"
    )
    group.add_argument(
        "--output", type=Path, default=Path("noiseopt-evaluation"), help="output folder (default: noiseopt-evaluation)"
    )


def evaluate(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run `noiseopt evaluate`; all arguments are checked before anything is loaded."""
    require_plots("noiseopt evaluate")
    from ..quiet import quiet_libraries

    with quiet_libraries():  # transformers prints notices on import
        from .evaluate import Evaluation
        from .folder import CannotEvaluate
    try:
        plan = plan_of(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    make_folder(arguments.output)
    evaluation = Evaluation(plan, arguments.output)
    try:
        run(evaluation, arguments.output)
    except CannotEvaluate as error:
        raise SystemExit(str(error)) from None


def plan_of(arguments: argparse.Namespace) -> "Plan":
    """Build the plan. Raises `ValueError` or `OSError` for invalid arguments."""
    from .plan import HELD_OUT_FEATURES, ModelChoice, Plan, parse_settings, with_noise_samplers
    from .prompt_sets import load_prompts

    limit = arguments.limit or (None if arguments.prompts else FIRST_LOOK)
    call = parse_settings(arguments.call)
    models = tuple(ModelChoice.parse(name, call) for name in arguments.models or ["turbo"])
    embedded = all(model.embedded for model in models)
    rewards = arguments.rewards or (["clip"] if embedded else [])
    watched = arguments.watched if arguments.watched is not None else ["vqa"] if embedded else []
    held_out = "dinov2" if embedded else HELD_OUT_FEATURES
    features, more_features = split_features(arguments.features or [held_out])
    if arguments.noise_samplers and "noise_sampler" in call:
        raise ValueError(
            f"Expected no noise_sampler in `--call` beside `--noise-sampler`, but got {call['noise_sampler']!r}. Pass "
            "all as `--noise-sampler`."
        )
    return Plan(
        models=models,
        methods=with_noise_samplers(arguments.methods or ["reno"], arguments.noise_samplers or ["white"]),
        prompts=load_prompts(arguments.prompts or "validation", limit=limit),
        seeds=arguments.seeds,
        rewards=tuple(pair for text in rewards for pair in weighted(text)),
        watched=tuple(name for name in watched if name not in rewards),
        features=features,
        more_features=more_features,
        references=arguments.references,
        best_of=arguments.best_of,
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads,
    )


def split_features(names: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """Return the first features that are compared by cosine, the embedding, and the others; "none" stands for none."""
    from .plan import metric_of

    if "none" in names:
        if len(names) > 1:
            raise ValueError(f"Expected `--features none` alone, but got {', '.join(names)}. Leave out one of them.")
        return None, ()
    embedding = next((name for name in names if metric_of(name) == "cosine"), None)
    place = len(names) if embedding is None else names.index(embedding)
    return embedding, (*names[:place], *names[place + 1 :])


def weighted(text: str) -> list[tuple[str, float]]:
    """Parse `"clip"` or `"clip=0.5"`, and expand presets."""
    from ..rewards.contract.reward_sum import REWARD_PRESETS

    name, equals, weight = text.rpartition("=")
    try:
        name, factor = (name, float(weight)) if equals else (text, 1.0)
    except ValueError:
        raise ValueError(f"Expected a reward as NAME or NAME=WEIGHT, but got {text!r}.") from None
    if not math.isfinite(factor):
        raise ValueError(f"Expected a finite weight, but got {text!r}.")
    return [(member, factor * of) for member, of in REWARD_PRESETS.get(name, {name: 1.0}).items()]


def run(evaluation: "Evaluation", output: Path) -> None:
    plan = evaluation.plan
    if evaluation.is_main:
        print_problems(plan.prompts.problems)
        prompts, seeds = len(plan.prompts.prompts), plan.seeds
        print(f"Evaluating {names(plan)} on {prompts} prompts of {plan.prompts.name} × {seeds} seeds ...", flush=True)
    try:
        results = evaluation.run()
    except KeyboardInterrupt:
        if evaluation.is_main:
            print(f"\nInterrupted. Finished units are in {output}; the same command continues.", file=sys.stderr)
        raise
    if results is not None:
        from .terminal import print_results

        print_results(results)
        for path in sorted(path for path in output.iterdir() if path.is_file() and not path.name.startswith(".")):
            print(f"wrote {path}")


def print_problems(problems: Sequence[str], most: int = 10) -> None:
    """Print the entries of a prompt file that are left out."""
    more = [f"... and {len(problems) - most} more."] * (len(problems) > most)
    for sentence in [*problems[:most], *more]:
        print(f"Skipped: {shown_lines(sentence)}", file=sys.stderr)


def names(plan: "Plan") -> str:
    methods, models = [method.label for method in plan.methods], [model.name for model in plan.models]
    return f"{', '.join(methods)} on {', '.join(models)}"
