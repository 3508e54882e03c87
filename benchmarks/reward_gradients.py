"""Savings of `RewardSum` over a naive weighted sum of rewards: time and peak memory, as ratios within one run.

python benchmarks/reward_gradients.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from noiseopt import RewardSum, shapes_world
from noiseopt.evaluation.measure import PeakMemory, synchronize
from noiseopt.quiet import quiet_libraries
from noiseopt.rewards import CLIPScore

PROMPT = "a red circle left of a blue star"
# vision: width, layers, heads, patch; text: width, layers, heads. Random weights do not affect time and memory.
SIZES = {
    "tiny": ((64, 2, 2, 32), (64, 2, 2)),
    "B": ((768, 12, 12, 16), (512, 12, 8)),
    "L": ((1024, 24, 16, 14), (768, 12, 12)),
    "H": ((1280, 32, 16, 14), (1024, 24, 16)),
}


def build_reward(size: str, seed: int) -> CLIPScore:
    """Build a CLIP reward with a published architecture."""
    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(shapes_world.path("clip"))
    (width, layers, heads, patch), (text_width, text_layers, text_heads) = SIZES[size]
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers}
    config = CLIPConfig(
        vision_config=vision | {"num_attention_heads": heads, "patch_size": patch, "image_size": 224},
        text_config=text | special | {"num_attention_heads": text_heads, "vocab_size": len(tokenizer)},
        projection_dim=text_width,
    )
    torch.manual_seed(seed)
    return CLIPScore(CLIPModel(config), tokenizer)


def naive(rewards: RewardSum, images: torch.Tensor) -> torch.Tensor:
    """Build one graph of all rewards, and run one backward pass."""
    total = sum(w * r(images, PROMPT) for w, r in zip(rewards.weights.values(), rewards.rewards, strict=True))
    return torch.autograd.grad(total.sum(), images)[0]  # pyright: ignore[reportAttributeAccessIssue]


def naive_with_text(rewards: RewardSum, images: torch.Tensor) -> torch.Tensor:
    """Do as `naive`, but encode the prompt each time, as loops that call the whole model do."""
    for reward in rewards.rewards:
        reward.prompt_features.clear()  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
    return naive(rewards, images)


def ours(rewards: RewardSum, images: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(rewards(images, PROMPT).total.sum(), images)[0]


WAYS: dict[str, Callable[[RewardSum, torch.Tensor], torch.Tensor]] = {
    "naive sum, text encoded at each step": naive_with_text,
    "naive sum, text encoded once": naive,
    "RewardSum": ours,
}


def measure(rewards: RewardSum, images: torch.Tensor, rounds: int) -> dict[str, list[tuple[float, float | None]]]:
    """Return the seconds and peak MiB of each of `WAYS` in each round. The ways take turns after a warm-up."""
    found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in WAYS}
    for round_ in range(rounds + 1):
        for name, way in WAYS.items():
            memory = PeakMemory(images.device)
            memory.start()
            started = time.perf_counter()
            way(rewards, images)
            synchronize(images.device)
            found[name] += [(time.perf_counter() - started, memory.peak())] if round_ else []
    return found


def ratio(values: list[float | None], reference: list[float | None]) -> str:
    """Return the median of the ratios within a round, with quartiles; a dash if not measured."""
    ratios = [ours / theirs for ours, theirs in zip(values, reference, strict=True) if ours is not None and theirs]
    low, middle, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * (ratios or [float("nan")])
    )
    return f"{middle:.2f} [{low:.2f}–{high:.2f}]" if ratios else "–"


def weight_bytes(rewards: RewardSum) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in rewards.parameters())


def main(arguments: list[str] | None = None) -> dict[str, list[tuple[float, float | None]]]:
    parser = argparse.ArgumentParser(description="Savings of RewardSum over a naive weighted sum.")
    parser.add_argument("--size", choices=SIZES, default="B", help="size of each CLIP; HPSv2 and PickScore have H")
    parser.add_argument("--rewards", type=int, default=4, help="number of rewards; ReNO has 4")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--side", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    rewards = RewardSum([(build_reward(options.size, seed), 1.0 + seed) for seed in range(options.rewards)])
    rewards = rewards.to(options.device, getattr(torch, options.dtype))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.images, 3, options.side, options.side, generator=generator)
    images = images.to(options.device).requires_grad_()
    found = measure(rewards, images, options.rounds)
    difference = (ours(rewards, images) - naive(rewards, images)).norm() / naive(rewards, images).norm()
    first = found[next(iter(WAYS))]
    print(f"{options.rewards} rewards of CLIP-{options.size}, {options.images} × {options.side} px, {options.dtype}")
    print("\n| relative to the first row | time of a step | peak memory beside the weights |\n|---|---|---|")
    for name, rows in found.items():
        columns = [ratio([row[i] for row in rows], [row[i] for row in first]) for i in range(2)]
        print(f"| {name} | " + " | ".join(columns) + " |")
    before = weight_bytes(rewards)
    rewards.drop_text_encoders(PROMPT)
    print(f"\nrelative difference of the gradients: {difference:.1e}")
    print(f"weights held once the text towers are dropped: {weight_bytes(rewards) / before:.2f} of all")
    return found


if __name__ == "__main__":
    main()
