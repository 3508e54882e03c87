"""The command `noiseopt vary`: images near one that was found."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_device, examples, make_folder, natural, positive

if TYPE_CHECKING:
    import torch

    from .evaluation.plan import ModelChoice
    from .pipelines import NoiseResult

DESCRIPTION = """\
Generate variations of the image of a noise file: the same prompt, model and arguments, and a noise near the one in the
file. Their noises are in one file, of which each can be varied again with --image.
"""


def add_vary(commands) -> None:
    """Add the parser of the command to `commands`, the result of `add_subparsers`."""
    parser = commands.add_parser(
        "vary",
        help="generate images near one whose noise is in a file",
        description=DESCRIPTION,
        epilog=examples(
            "noiseopt vary noiseopt-demo/noise.safetensors --strength 0.2 --images 8",
            "noiseopt vary noise.safetensors --image 2 --keep layout --strength 0.6",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, metavar="FILE", help="noise file of demo, generate or `result.save`")
    parser.add_argument(
        "--strength", type=share, default=0.2, help="from 0, the same, to 1, another image (default: 0.2)"
    )
    parser.add_argument("--images", type=positive, default=4, metavar="COUNT", help="variations (default: 4)")
    parser.add_argument("--image", type=positive, default=1, metavar="N", help="which image of the file (default: 1)")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the first variation (default: 0)")
    parser.add_argument("--keep", choices=("layout", "detail"), help="what stays as it is (default: nothing)")
    parser.add_argument("--model", metavar="NAME", help="embedded model, Hub id or folder (default: that of the file)")
    parser.add_argument("--output", type=Path, default=Path("noiseopt-variations"), help="output folder")
    add_device(parser.add_argument_group("execution"))
    parser.set_defaults(run=lambda arguments: vary(arguments, parser))


def share(text: str) -> float:
    """Parse a number in [0, 1], as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"Expected a number from 0 to 1, but got {text!r}.")
    return value


def vary(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run `noiseopt vary`; all arguments are checked before a model is loaded."""
    from .quiet import quiet_libraries

    with quiet_libraries():
        from .evaluation.unit import picture
        from .pipelines import NoiseResult
        from .schedulers import Vary
    try:
        result = NoiseResult.load(arguments.result)
        model = model_of(result, arguments.model, arguments.image)
        noise = one_of(result.noise, arguments.image)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    make_folder(arguments.output)
    sampler = Vary(arguments.strength, noise, seed=arguments.seed, keep=arguments.keep)
    prompt = result.provenance["prompts"][arguments.image - 1]
    try:
        images, noises = drawn(model, prompt, sampler, arguments)
    except (TypeError, ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    for number, image in enumerate(images, 1):
        picture(image).save(arguments.output / f"variation_{number}.png")
    noises.save(arguments.output / "variations.safetensors")
    variations = "1 variation" if len(images) == 1 else f"{len(images)} variations"
    print(f"{prompt}: {variations} at strength {arguments.strength:g}, seed {arguments.seed}.")
    print(f"{arguments.output}: variation_1.png and so on, and their noises in variations.safetensors.")


def model_of(result: "NoiseResult", name: str | None, image: int) -> "ModelChoice":
    """Return the model of a result with the arguments of its call for an image, or another with its own.

    Raises:
        ValueError: If the result does not name one that can be loaded, or lacks arguments of its call.
    """
    from . import shapes_world
    from .evaluation.plan import ModelChoice

    recorded = str(result.provenance.get("model"))
    embedded = recorded.rpartition("/")[2]
    if "shapes_world/" in recorded and embedded in shapes_world.MODELS:
        recorded = embedded
    if unrecorded := result.provenance.get("unrecorded"):
        raise ValueError(
            f"Expected a result whose whole call is recorded, but {unrecorded} of this one are not. Call the pipeline "
            "yourself, with `noise_sampler=Vary(strength, result)`."
        )
    if name not in (None, recorded):
        return ModelChoice.parse(name, {})
    own, given = ("num_images_per_prompt", "output_type", "return_dict"), result.provenance.get("arguments", {})
    row = (image - 1) // int(given.get("num_images_per_prompt") or 1)
    call = {key: value for key, value in given.items() if key not in own}
    of_prompts = {key: value for key, value in call.items() if "prompt" in key and isinstance(value, list)}
    return ModelChoice.parse(recorded, call | {key: values[row] for key, values in of_prompts.items()})


def one_of(noise: "torch.Tensor", number: int) -> "torch.Tensor":
    """Return the noise `(1, C, H, W)` of an image, counted from 1."""
    if number > len(noise):
        raise ValueError(f"Expected `--image` of at most {len(noise)}, the images in the file, but got {number}.")
    return noise[number - 1 : number]


def drawn(model: "ModelChoice", prompt: str, sampler: Any, arguments: argparse.Namespace) -> tuple[Any, "NoiseResult"]:
    """Return the images of a prompt from the noises of a sampler, `(B, 3, H, W)`, and the noises."""
    import torch
    from accelerate import PartialState

    from .evaluation.evaluate import load_pipeline
    from .pipelines import optimize_noise
    from .pipelines.baselines.plain_sampling import PlainSampling
    from .quiet import quiet_libraries

    device = torch.device(arguments.device or PartialState().device or "cpu")
    with quiet_libraries():
        pipe = load_pipeline(model, arguments.dtype, device)
    streams = [torch.Generator().manual_seed(arguments.seed + row) for row in range(arguments.images)]
    call = {**model.arguments, "num_images_per_prompt": arguments.images}
    result = optimize_noise(
        pipe, prompt, PlainSampling(), noise_sampler=sampler, callbacks=[], generator=streams, **call
    )
    call |= {"latents": result.latents, "generator": result.generator(), "output_type": "pt"}
    return pipe(prompt, **call).images, result
