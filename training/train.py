"""Train, export and report every model of the shapes world: `python -m training.train --output DIR`, in a checkout.

Choose stages with `--stages`. Each resumes from its last checkpoint; the generators also draw validation prompts into
DIR after every tenth of their training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .autoencoder import latents, train_decoder, train_vae
from .distillation import draw_pairs, train_sdxl_turbo, train_turbo
from .drawing import gallery
from .export import export
from .reading import train_clip, train_eyes, train_tower, train_vqa
from .refinement import refine_clip
from .report import report
from .teacher import train_base, train_guided, train_sd3, train_sdxl

STAGES = {
    "vae": train_vae,
    "decoder": train_decoder,
    "latents": latents,
    "base": train_base,
    "guided": train_guided,
    "pairs": draw_pairs,
    "turbo": train_turbo,
    "sdxl": train_sdxl,
    "sdxl-turbo": train_sdxl_turbo,
    "sd3": train_sd3,
    "gallery": gallery,
    "eyes": train_eyes,
    "clip": train_clip,
    "refined": refine_clip,
    "tower": train_tower,
    "vqa": train_vqa,
    "export": export,
    "report": report,
}
SAMPLES = {  # default number of samples by stage
    "vae": 64_000,
    "decoder": 32_000,
    "base": 96_000,
    "guided": 76_800,
    "turbo": 112_000,
    "sdxl": 24_000,
    "sdxl-turbo": 24_000,
    "sd3": 320_000,
    "eyes": 128_000,
    "clip": 128_000,
    "refined": 192_000,
    "tower": 128_000,
    "vqa": 240_000,
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the models of the shapes world.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, samples and `weights`")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--threads", type=int, default=1)
    precisions = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
    parser.add_argument("--dtype", default="bfloat16", choices=precisions, help="of the passes")
    parser.add_argument("--pictures", type=int, default=10_000, help="number of pictures of autoencoder and readers")
    parser.add_argument("--latents", type=int, default=30_000, help="number of pictures of the generators")
    parser.add_argument("--pairs", type=int, default=10_240, help="number of images drawn by the teacher")
    parser.add_argument("--failures", type=int, default=5_000, help="number of imitated failures")
    parser.add_argument("--slips", type=float, default=0.5, help="share of careless captions")
    parser.add_argument("--gallery", type=int, default=9_600, help="images by each one-step model; 1/4 by others")
    parser.add_argument("--climbs", type=int, default=256, help="ascents per round of refinement")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of refinement")
    parser.add_argument("--report-prompts", type=int, default=170, help="validation prompts")
    parser.add_argument("--report-seeds", type=int, default=2, help="images of each of them")
    parser.add_argument("--report-sets", type=int, default=24, help="prompts of which sets and gradients are measured")
    parser.add_argument("--report-pictures", type=int, default=512, help="rendered pictures")
    for stage, samples in SAMPLES.items():
        parser.add_argument(f"--{stage}-samples", type=int, default=samples, metavar="N", help=f"default {samples}")
    args = parser.parse_args(argv)
    args.dtype = precisions[args.dtype]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
