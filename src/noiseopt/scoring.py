"""`noiseopt rewards` and `noiseopt score`: the registered rewards, and their scores of image files."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import examples
from .image_files import image_files, read_image
from .reward_table import HEAD, ROWS
from .shown_text import LONGEST_LINE, shown

if TYPE_CHECKING:
    from .rewards.contract.reward import Reward


def add_rewards(commands) -> None:
    parser = commands.add_parser(
        "rewards",
        help="list the rewards: what they measure, range, gradient, memory, checkpoint, license",
        description="List the rewards of images, those of sets, and the features by which sets are compared. A Hub id "
        "or folder of a compatible checkpoint works wherever a name does. Nothing is loaded or downloaded.",
        epilog=examples("noiseopt rewards", "noiseopt rewards --json"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=rewards)


def add_score(commands) -> None:
    parser = commands.add_parser(
        "score",
        help="score image files with rewards",
        description="Score image files with one or more rewards. Higher is better; each reward has its own scale. "
        "Transparent images are shown on white.",
        epilog=examples(
            'noiseopt score a.png b.png --prompt "a red circle" --reward clip --reward brightness',
            "noiseopt score images/ --reward aesthetic --json",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file, or folder of image files")
    parser.add_argument(
        "--prompt", action="append", dest="prompts", metavar="TEXT", help="one prompt for all images, or one per image"
    )
    parser.add_argument(
        "--reward",
        action="append",
        dest="rewards",
        required=True,
        metavar="NAME",
        help="name in `noiseopt rewards`, also a preset, embedded model (clip, vqa), Hub id or folder; repeatable",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if available)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: bfloat16 on CUDA, else float32)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=lambda arguments: score(arguments, parser))


def rewards(arguments: argparse.Namespace) -> None:
    """Run `noiseopt rewards`, without importing the rewards."""
    if arguments.json:
        rows = [dataclasses.asdict(row) | {"gibibytes": row.gibibytes} for row in ROWS]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    print_table(HEAD, [row.cells() for row in ROWS])


def score(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run `noiseopt score`; all arguments are checked before a model is loaded."""
    from .quiet import quiet_libraries

    try:
        with quiet_libraries():
            images = [file for path in arguments.images for file in image_files(path)]
            names = expanded(arguments.rewards)
            prompts = prompts_for(images, arguments.prompts)
            check_request(names, arguments.prompts, arguments.device)
            for path in images:
                read_image(path)
            scores = {name: score_files(name, arguments, images, prompts) for name in names}
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    except OSError as error:
        raise SystemExit(f"Cannot load the weights of a reward: {error}") from None
    if arguments.json:
        rows = [{"image": str(path), "prompt": prompt} for path, prompt in zip(images, prompts, strict=True)]
        print(json.dumps([row | {name: scores[name][i] for name in scores} for i, row in enumerate(rows)], indent=2))
        return
    rows = [
        [shown(path, LONGEST_LINE), *(f"{scores[name][i]:.4f}" for name in scores)] for i, path in enumerate(images)
    ]
    print_table(["image", *scores], rows)


def prompts_for(images: Sequence[Path], prompts: Sequence[str] | None) -> list[str | None]:
    """Return one prompt per image. Raises `ValueError` if their numbers do not match."""
    if prompts is None or len(prompts) == 1:
        return list(prompts or [None]) * len(images)
    if len(prompts) != len(images):
        raise ValueError(f"Expected one --prompt, or one for each of {len(images)} images, but got {len(prompts)}.")
    return list(prompts)


def expanded(names: Sequence[str]) -> list[str]:
    """Replace presets by their members, and drop duplicates."""
    from .rewards.contract.reward_sum import REWARD_PRESETS

    return list(dict.fromkeys(member for name in names for member in REWARD_PRESETS.get(name, [name])))


def check_request(names: Sequence[str], prompts: Sequence[str] | None, device: str | None) -> None:
    """Raise `ValueError` for an unknown reward or device, or a missing prompt."""
    from .evaluation.plan import EMBEDDED_REWARDS, check_device, check_reward

    check_device(device)
    for name in names:
        check_reward(name)
        reads_prompt = name in EMBEDDED_REWARDS or reads_prompts(name)
        if prompts is None and reads_prompt:
            raise ValueError(f"Expected a prompt for reward {name!r}, but got none. Add --prompt.")


def reads_prompts(name: str) -> bool:
    """Return whether a registered reward needs a prompt; `False` for a checkpoint, which is asked once it is loaded."""
    from .rewards.contract.registry import REWARDS

    if name not in REWARDS:
        return False
    factory = REWARDS[name]
    return bool((factory if isinstance(factory, type) else factory()).requires_prompt)


def score_files(
    name: str, arguments: argparse.Namespace, images: Sequence[Path], prompts: Sequence[str | None]
) -> list[float]:
    """Score the files one at a time, since their sizes differ."""
    import torch

    reward = load_reward(name, arguments)
    with torch.no_grad():
        pairs = zip(images, prompts, strict=True)
        return [reward(read_image(path), prompt).item() for path, prompt in pairs]


def load_reward(name: str, arguments: argparse.Namespace) -> "Reward":
    """Load a registered or embedded reward."""
    import torch
    from accelerate import PartialState

    from .evaluation.instruments import weights_of
    from .evaluation.plan import EMBEDDED_REWARDS
    from .rewards.contract.registry import AutoReward

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    device = arguments.device or PartialState().device
    return AutoReward.from_pretrained(weights_of(name, EMBEDDED_REWARDS), device=device, dtype=dtype)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths: Mapping[int, int] = {i: max(len(row[i]) for row in (head, *rows)) for i in range(len(head))}
    for row in (head, ["-" * widths[i] for i in widths], *rows):
        print("  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip())
