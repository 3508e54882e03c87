"""`noiseopt rewards` and `noiseopt score`: the registered rewards, and their scores of image files."""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .rewards.contract.reward import Reward

GIB = 2**30


def add_rewards(commands) -> None:
    parser = commands.add_parser(
        "rewards",
        help="list the rewards: checkpoint, license, range, gradient, memory",
        description="List the registered rewards. A Hub id or folder of a compatible checkpoint works wherever a name "
        "does. Nothing is loaded or downloaded.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=rewards)


def add_score(commands) -> None:
    parser = commands.add_parser(
        "score",
        help="score image files with rewards",
        description="Score image files with one or more rewards. Higher is better; each reward has its own scale.",
        epilog='example: noiseopt score a.png b.png --prompt "a red circle" --reward clip --reward brightness',
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--prompt", action="append", dest="prompts", metavar="TEXT", help="one prompt for all images, or one per image"
    )
    parser.add_argument(
        "--reward",
        action="append",
        dest="rewards",
        required=True,
        metavar="NAME",
        help="name in `noiseopt rewards`, preset (reno), embedded model (clip, vqa), Hub id or folder; repeatable",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: bfloat16 on CUDA, else float32)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=lambda arguments: score(arguments, parser))


@dataclasses.dataclass(frozen=True)
class RewardFacts:
    """One row of `noiseopt rewards`.

    Attributes:
        name: The registered name.
        checkpoint: The Hub id that the name loads; `None` without weights, or where a folder must be given.
        weights_file: The file with the weights, if it is not in transformers' format.
        license: License of the checkpoint.
        range: Lowest and highest score, if bounded.
        differentiable: Whether it has a gradient.
        requires_prompt: Whether it reads a prompt.
        gibibytes: Size of the weights in bfloat16, in GiB; twice as much in float32.
    """

    name: str
    checkpoint: str | None
    weights_file: str | None
    license: str | None
    range: tuple[float, float] | None
    differentiable: bool
    requires_prompt: bool
    gibibytes: float

    @classmethod
    def of(cls, name: str) -> "RewardFacts":
        """Return the facts of a registered reward without loading it."""
        from .rewards.contract.registry import REWARDS
        from .rewards.contract.reward import Reward

        factory = REWARDS.find(name)
        reward: Any = factory if isinstance(factory, type) and issubclass(factory, Reward) else factory()
        return cls(
            name,
            reward.default_checkpoint,
            reward.weights_file,
            reward.license,
            reward.range,
            reward.differentiable,
            reward.requires_prompt,
            (reward.parameter_count or 0) * 2 / GIB,
        )

    def row(self) -> list[str]:
        """Format the facts as a row of the table."""
        low, high = self.range or (-math.inf, math.inf)
        return [
            self.name,
            self.checkpoint or (f"file {self.weights_file}" if self.weights_file else "–"),
            self.license or "–",
            f"{low:g} … {high:g}".replace("inf", "∞") if self.range else "open",
            "yes" if self.differentiable else "no",
            "yes" if self.requires_prompt else "no",
            f"{self.gibibytes:.2f}" if self.gibibytes else "–",
        ]


def rewards(arguments: argparse.Namespace) -> None:
    """Run `noiseopt rewards`."""
    from .quiet import quiet_libraries

    with quiet_libraries():
        from .rewards.contract.registry import list_rewards

        facts = [RewardFacts.of(name) for name in list_rewards()]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(fact) for fact in facts], indent=2))
        return
    head = ["reward", "checkpoint", "license of the weights", "range", "gradient", "prompt", "GiB in bfloat16"]
    print_table(head, [fact.row() for fact in facts])


def score(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run `noiseopt score`; all arguments are checked before a model is loaded."""
    from .quiet import quiet_libraries

    try:
        with quiet_libraries():
            names = expanded(arguments.rewards)
            prompts = prompts_for(arguments.images, arguments.prompts)
            check_request(names, arguments.prompts, arguments.device)
            for path in arguments.images:
                read_image(path)
            scores = {name: score_files(name, arguments, prompts) for name in names}
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    except OSError as error:
        raise SystemExit(f"Cannot load the weights of a reward: {error}") from None
    if arguments.json:
        rows = [{"image": str(path), "prompt": prompt} for path, prompt in zip(arguments.images, prompts, strict=True)]
        print(json.dumps([row | {name: scores[name][i] for name in scores} for i, row in enumerate(rows)], indent=2))
        return
    rows = [[str(path), *(f"{scores[name][i]:.4f}" for name in scores)] for i, path in enumerate(arguments.images)]
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
    from .rewards.contract.registry import REWARDS

    check_device(device)
    for name in names:
        check_reward(name)
        reads_prompt = name in EMBEDDED_REWARDS or (name in REWARDS and RewardFacts.of(name).requires_prompt)
        if prompts is None and reads_prompt:
            raise ValueError(f"Expected a prompt for reward {name!r}, but got none. Add --prompt.")


def score_files(name: str, arguments: argparse.Namespace, prompts: Sequence[str | None]) -> list[float]:
    """Score the files one at a time, since their sizes differ."""
    import torch

    reward = load_reward(name, arguments)
    with torch.no_grad():
        pairs = zip(arguments.images, prompts, strict=True)
        return [reward(read_image(path), prompt).item() for path, prompt in pairs]


def load_reward(name: str, arguments: argparse.Namespace) -> "Reward":
    """Load a registered or embedded reward."""
    import torch

    from .evaluation.instruments import weights_of
    from .evaluation.plan import EMBEDDED_REWARDS
    from .rewards.contract.registry import AutoReward

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return AutoReward.from_pretrained(weights_of(name, EMBEDDED_REWARDS), device=arguments.device, dtype=dtype)


def read_image(path: Path) -> "torch.Tensor":
    """Read an image as `(1, 3, H, W)` in [0, 1], upright. Raises `ValueError` if that is impossible."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            mode = picture.mode
            pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"Expected an image file, but {path} cannot be opened: {error.strerror}.") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"Expected an image that Pillow can read, but {path} is not one or is damaged: {error}"
        ) from None
    if mode[0] in "IF":  # 16 or 32 bits, which Pillow would clip at 255
        raise ValueError(f"Expected an image with 8 bits per channel, but {path} has mode {mode}. Convert it first.")
    return torch.from_numpy(pixels).movedim(2, 0)[None].float() / 255


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths: Mapping[int, int] = {i: max(len(row[i]) for row in (head, *rows)) for i in range(len(head))}
    for row in (head, ["-" * widths[i] for i in widths], *rows):
        print("  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip())
