"""Run by `test_loading.py` in a fresh process: load a card, compare images, and run the programs of its README.

The card is loaded from its folder and from the Hub. Arguments: those of `main`. Prints one JSON object.
"""

import ast
import dataclasses
import functools
import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tiny_pipelines import BUILDERS, SIZE, call_arguments, quiet, save_tiny_clip
from transformers import T5Config, T5EncoderModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """The calls of the cards of a method.

    Attributes:
        plain: Arguments of every call besides those of the family; the stock class takes them too.
        off: Arguments that leave a pipeline as its stock class.
        requests: Arguments that optimize the noise: each gives other images.
    """

    plain: dict[str, Any]
    off: dict[str, Any]
    requests: list[dict[str, Any]]


TRIALS = {
    "reno": Trial(
        plain={"num_inference_steps": 1, "guidance_scale": 0.0},
        off={},
        requests=[{"rewards": {"red": 1.0, "tiny/clip": 0.1}, "steps": 3}],
    ),
    "noise_diffusion": Trial(
        plain={},
        off={},
        requests=[
            {"rewards": "brightness", "steps": 3},
            {
                "rewards": "tiny/clip",
                "steps": 3,
                "selection": "exact",
                "method_kwargs": {"score_range": (-100, 100)},
            },
        ],
    ),
    "cno": Trial(
        plain={"num_images_per_prompt": 2},
        off={"steps": 0},
        requests=[{}, {"steps": 2, "method_kwargs": {"window_size": 4}}],
    ),
    "never_too_late": Trial(
        plain={"num_images_per_prompt": 2},
        off={},
        requests=[
            {"diversity": {"dpp": ("color_histogram", 150.0)}, "rewards": {"tiny/clip": 0.1}, "steps": 3},
            {
                "diversity": {"vendi_2": ("tiny/clip", 5.0), "pairwise": ("tiny_image", 60.0)},
                "guard": {"sharpness": {"keep": 0.01}},
                "steps": 2,
                "method_kwargs": {"hinge": {"vendi_2": 1.9}},
            },
        ],
    ),
}
# Defaults of the programs of a card: fewer steps and smaller images than those of its model.
LESS = {"num_inference_steps": 2, "steps": 2, **SIZE}


def published(family: str) -> Any:
    """Return a tiny pipeline with all submodules that the programs of a card expect, such as SD3's third encoder."""
    pipe = quiet(BUILDERS[family]())
    if "text_encoder_3" in pipe.components:
        other = BUILDERS["flux"]()
        width = pipe.transformer.config.joint_attention_dim
        config = T5Config.from_dict({**other.text_encoder_2.config.to_dict(), "d_model": width})
        pipe.register_modules(text_encoder_3=T5EncoderModel(config).eval(), tokenizer_3=other.tokenizer_2)
    return pipe


def generate(pipe: Any, **kwargs: Any) -> Any:
    """Generate images from one seed."""
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red cat", output_type="pt", **{"generator": torch.Generator().manual_seed(7), **kwargs})


def images_of(outputs: list[Any]) -> torch.Tensor:
    return torch.stack([output.images for output in outputs])


def regenerated(pipe: Any, outputs: list[Any], path: Path, **kwargs: Any) -> list[Any]:
    """Generate images from the noises of `outputs`, written to a file and read by the package."""
    result = importlib.import_module("noiseopt.pipelines.results.noise_result").NoiseResult
    again = []
    for output in outputs:
        output.noise_result.save(path)
        noise = result.load(path)
        again.append(generate(pipe, latents=noise.latents, generator=noise.generator(), **kwargs))
    return again


def main(
    name: str,
    family: str,
    method: str,
    module: str,
    folder: str,
    repository: str,
    tag: str,
    base_model: str,
    hub: Path,
) -> dict[str, bool]:
    """Return what is true of the card."""
    trial = TRIALS[method]
    plain = call_arguments(family) | trial.plain
    built, weights = published(family), hub / base_model
    built.save_pretrained(weights)
    stock = type(built).from_pretrained(weights)  # the last digit depends on how weights lie in memory
    save_tiny_clip(hub / "tiny" / "clip")
    load = functools.partial(DiffusionPipeline.from_pretrained, trust_remote_code=True)

    def optimized(pipe: Any) -> list[Any]:
        return [generate(pipe, **plain, **request) for request in trial.requests]

    local = load(weights, custom_pipeline=folder)
    remote = load(base_model, custom_pipeline=repository, custom_revision=tag)
    outputs, stock_images = optimized(remote), generate(stock, **plain).images
    images = images_of(outputs)
    pairs = itertools.combinations([stock_images, *images], 2)
    facts = {
        "folder and Hub generate the same": torch.equal(images, images_of(optimized(local))),
        "the noise was optimized as asked": not any(torch.equal(*pair) for pair in pairs),
        "switched off it is the stock pipeline": torch.equal(
            generate(remote, **plain, **trial.off).images, stock_images
        ),
    }
    first, second = re.findall(r"```python\n(.*?)```", (hub / repository / "README.md").read_text("utf-8"), re.DOTALL)
    output = run(first)["output"]
    facts["the package was not needed"] = "noiseopt" not in sys.modules
    package = getattr(importlib.import_module(module), name).from_pretrained(weights)
    again = regenerated(package, outputs, hub / "noise.safetensors", **plain, **trial.off)
    facts["the package generates the same"] = torch.equal(images, images_of(optimized(package)))
    facts["the package generates it again from the saved noise"] = torch.equal(images, images_of(again))
    facts["the program saves its images"] = saved(output)
    facts["the program with the package runs"] = type(run(second)["pipe"]) is type(package)
    return facts


def run(program: str) -> dict[str, Any]:
    """Run a program of a card, with `LESS` and without a GPU, and return the names that it defines."""
    tree = ast.parse(program.replace('"cuda"', '"cpu"'))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe"]
    for call in calls:
        given = {keyword.arg for keyword in call.keywords}
        call.keywords += [ast.keyword(name, ast.Constant(LESS[name])) for name in LESS.keys() - given]
    names: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), "README.md", "exec"), names)
    return names


def saved(output: Any) -> bool:
    """Return whether the images and the noise of a run are in this folder."""
    result = importlib.import_module("noiseopt.pipelines.results.noise_result").NoiseResult
    (noise,) = Path().glob("*.safetensors")
    loaded = result.load(noise).latents
    return len(list(Path().glob("*.png"))) == len(output.images) and torch.equal(loaded, output.noise_result.latents)


if __name__ == "__main__":
    *given, repositories = sys.argv[1:]
    print(json.dumps(main(*given, hub=Path(repositories))))
