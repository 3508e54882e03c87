"""The shapes world: a small embedded text-to-image world with a renderer, an exact judge and trained models.

>>> from noiseopt import shapes_world
>>> pipe = shapes_world.load("turbo")
>>> prompt = "a red circle left of a blue star"
>>> images = pipe(prompt, num_inference_steps=1, guidance_scale=0.0, output_type="pt").images
>>> shapes_world.judge(images, prompt)[0].correct
"""

from __future__ import annotations

from .captions import (
    CATEGORIES,
    HELD_OUT_PROMPTS,
    OBJECTS,
    TRAIN_PROMPTS,
    VALIDATION_PROMPTS,
    Request,
    caption,
    category,
    parse,
    sample_scene,
)
from .embedded import MODELS, EmbeddedModel, load, path
from .judge import Thing, Verdict, judge, see
from .world import COLORS, KINDS, RELATIONS, SIZE, Scene, Shape, render

__all__ = [
    "CATEGORIES",
    "COLORS",
    "HELD_OUT_PROMPTS",
    "KINDS",
    "MODELS",
    "OBJECTS",
    "RELATIONS",
    "SIZE",
    "TRAIN_PROMPTS",
    "VALIDATION_PROMPTS",
    "EmbeddedModel",
    "Request",
    "Scene",
    "Shape",
    "Thing",
    "Verdict",
    "caption",
    "category",
    "judge",
    "load",
    "parse",
    "path",
    "render",
    "sample_scene",
    "see",
]
