"""The command `noiseopt generate`: its arguments, and its request."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_device, examples, make_folder, natural, positive

if TYPE_CHECKING:
    from .generation import Request

DESCRIPTION = """\
Generate images of many prompts before and after their noise is optimized. Finished prompts are skipped by the next run
of the same command, and a half-done one goes on.
"""

EPILOG = """\
results, in the folder given by --output:
  index.html       all images, before and after, with their rewards
  results.jsonl    one object for each prompt: files, seeds, rewards before and after, seconds; or its error
                   (last: finished prompts of earlier runs that this one did not ask for)
  images/          PNG files, and beside them the optimized noise of each prompt, for noiseopt.NoiseResult.load
  settings.json    what the images depend on; the folder takes no others

A prompt that cannot be read or generated is named with its line, and the others go on; the exit status is then 1.
To split the prompts over processes or GPUs:
  accelerate launch -m noiseopt generate ...
"""

EXAMPLES = (
    "noiseopt generate --model turbo --prompts validation --limit 8 --method reno:steps=20",
    "noiseopt generate --model stabilityai/sdxl-turbo --call num_inference_steps=1,guidance_scale=0.0 \\\n"
    "      --prompts prompts.txt --method reno --reward hpsv2.1 --images 4 --budget 20s --output images",
)


def add_generate(commands) -> None:
    """Add the parser of the command to `commands`, the result of `add_subparsers`."""
    parser = commands.add_parser(
        "generate",
        help="generate images of a file of prompts with optimized noise, resumable",
        description=DESCRIPTION,
        epilog=EPILOG + examples(*EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_task(parser)
    add_machine(parser)
    parser.set_defaults(run=lambda arguments: generate(arguments, parser))


def add_task(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("task")
    group.add_argument(
        "--model",
        default="turbo",
        metavar="NAME",
        help="embedded model (turbo, guided, sdxl, sdxl-turbo, sd3), Hub id or folder (default: turbo)",
    )
    group.add_argument(
        "--prompts",
        required=True,
        metavar="SOURCE",
        help="file with a prompt in each line, or in another format that noiseopt evaluate reads; or train, validation "
        "or held-out of the shapes world",
    )
    group.add_argument("--limit", type=positive, metavar="COUNT", help="use only the first prompts (default: all)")
    group.add_argument(
        "--method",
        default="reno",
        metavar="NAME[:SETTING=VALUE,...]",
        help="method with settings, such as 'reno:steps=20' (default: reno)",
    )
    group.add_argument(
        "--reward",
        action="append",
        dest="rewards",
        metavar="NAME[=WEIGHT]",
        help="reward to optimize: a name in `noiseopt rewards`, a Hub id, a folder, or reno for all rewards of that "
        "paper; repeatable (default for embedded models: the embedded clip, and vqa for the methods of Noise "
        "Diffusion's paper)",
    )
    group.add_argument("--images", type=positive, default=1, metavar="COUNT", help="images of each prompt (default: 1)")
    group.add_argument(
        "--seed", type=natural, default=0, help="seed of the first image of a prompt, plus 1 for each next (default: 0)"
    )
    group.add_argument(
        "--call",
        default="",
        metavar="NAME=VALUE,...",
        help="arguments of the pipeline's call, such as num_inference_steps=1,guidance_scale=0.0; embedded models have "
        "defaults",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    add_device(group)
    group.add_argument(
        "--budget",
        type=duration,
        metavar="TIME",
        help="most time for the optimization of each prompt, such as 20s, 1.5min or 2h; no step begins that would end "
        "later. (As a setting of the method, budget=20s takes the place of its steps.) Loading the model, encoding the "
        "prompt and drawing the images are not counted (default: all steps of the method)",
    )
    group.add_argument(
        "--output", type=Path, default=Path("noiseopt-images"), help="output folder (default: noiseopt-images)"
    )


def duration(text: str) -> float:
    """Parse a time such as "20s" or "1.5min" to seconds, as an argparse type. A bare number is in seconds."""
    from .callbacks.early_stopping import seconds_in

    try:
        return seconds_in(text if text.strip()[-1:].isalpha() else f"{text}s")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).replace(f"{text}s", text)) from None


def generate(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run `noiseopt generate`; all arguments are checked before anything is loaded."""
    from .quiet import quiet_libraries

    with quiet_libraries():  # transformers prints notices on import
        from .evaluation.folder import CannotEvaluate
        from .generation import Generation
    try:
        request = request_of(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    make_folder(arguments.output)
    generation = Generation(request, arguments.output)
    try:
        failed = generation.run()
    except CannotEvaluate as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        if generation.is_main:
            print(f"\nInterrupted. What is done is in {arguments.output}; the same command goes on.", file=sys.stderr)
        raise
    if failed:
        raise SystemExit(1)


def request_of(arguments: argparse.Namespace) -> "Request":
    """Build the request. Raises `ValueError` or `OSError` for invalid arguments."""
    from .evaluation.command import weighted
    from .evaluation.plan import MethodChoice, ModelChoice, parse_settings
    from .evaluation.prompt_sets import load_prompts
    from .generation import Request
    from .recipes import RECIPES, Recipe

    model = ModelChoice.parse(arguments.model, parse_settings(arguments.call))
    method = MethodChoice.parse(arguments.method)
    default = [RECIPES.get(method.name, Recipe()).reward] if model.embedded and method.takes_rewards else []
    rewards = dict(pair for text in arguments.rewards or default for pair in weighted(text))
    return Request(
        model=model,
        method=method,
        prompts=load_prompts(arguments.prompts, limit=arguments.limit),
        rewards=tuple(rewards.items()),
        images=arguments.images,
        seed=arguments.seed,
        budget=arguments.budget,
        device=arguments.device,
        dtype=arguments.dtype,
    )
