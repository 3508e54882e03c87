"""What a recorded figure depends on besides a command's arguments: a recipe's settings, and the weights of models."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from noiseopt import shapes_world
from noiseopt.recipes import RECIPES


def digest_of_defaults(method: str, *models: str) -> str:
    """Return 12 hexadecimal digits of the settings of a method's recipe and of the weights of embedded models.

    Folders in place of embedded models count by name.
    """
    digest = hashlib.sha256(repr(sorted(RECIPES[method].settings.items())).encode())
    for part in (part for model in models for part in parts_of(model)):
        digest.update(part)
    return digest.hexdigest()[:12]


def parts_of(model: str) -> Iterator[bytes]:
    yield model.encode()
    if model in shapes_world.MODELS:
        for path in sorted(Path(shapes_world.path(model)).rglob("*.safetensors")):
            yield path.read_bytes()
