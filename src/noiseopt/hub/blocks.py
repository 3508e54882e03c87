"""The cards of the blocks of modular pipelines, as data, and the texts of their repositories."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from ..pipelines.cno.block import CNOBlock
from ..pipelines.never_too_late.block import NeverTooLateBlock
from ..pipelines.noise_diffusion.block import NoiseDiffusionBlock
from ..pipelines.registry import METHODS
from ..pipelines.reno.block import ReNOBlock
from .cards import REQUIREMENTS, settings
from .markdown import code, sections, table, template

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclasses.dataclass(frozen=True)
class BlockCard:
    """One Hub repository of a block.

    Attributes:
        name: Its folder here and its name on the Hub.
        cls: The class of the block.
        call: The inputs of the example.
    """

    name: str
    cls: type[Any]
    call: str

    @property
    def room(self) -> str:
        return self.cls.__module__.split(".")[-2]

    @property
    def title(self) -> str:
        return f"{METHODS.find(self.room).__name__} as a block of modular pipelines"

    def files(self, namespace: str, version: str, source: str, bundle: str, code_of_bundle: str) -> dict[str, str]:
        """Return the texts of the repository: file name to text.

        Args:
            namespace: The account on the Hub.
            version: The version of the package that the bundle is made from.
            source: The source of the class file.
            bundle: The name of the bundle's file.
            code_of_bundle: Its text.
        """
        config = {"_class_name": self.cls.__name__, "auto_map": {"ModularPipelineBlocks": f"block.{self.cls.__name__}"}}
        return {
            "README.md": readme(self, namespace, version, bundle),
            "block.py": self.own_source(source, Path(bundle).stem),
            "modular_config.json": json.dumps(config, indent=2) + "\n",
            bundle: code_of_bundle,
        }

    def own_source(self, source: str, bundle: str) -> str:
        """Return the class file with one import from the bundle in place of those of the package."""
        relative = re.compile(r"^from \.\S* import (.+)\n", re.MULTILINE)
        names = ", ".join(sorted(relative.findall(source)))
        imports = f"\n\nfrom .{bundle} import {names}\n\n\nclass"
        return re.sub(r"\n{2,}class", imports, relative.sub("", source), count=1)


BLOCKS = (
    BlockCard("reno-block", ReNOBlock, 'prompt="a blue scooter in front of a green car", rewards="hpsv2.1", steps=20'),
    BlockCard("cno-block", CNOBlock, 'prompt="a blue scooter in front of a green car", num_images_per_prompt=4'),
    BlockCard(
        "noise-diffusion-block",
        NoiseDiffusionBlock,
        'prompt="a blue scooter in front of a green car", rewards="vqascore", steps=10',
    ),
    BlockCard(
        "never-too-late-block",
        NeverTooLateBlock,
        'prompt="a dog in a park", diversity={"dpp": 150.0}, num_images_per_prompt=4',
    ),
)


def readme(card: BlockCard, namespace: str, version: str, bundle: str) -> str:
    """Return the README of a block."""
    texts = sections(card.room)
    block = card.cls()
    inputs = [(code(each.name), each.description) for each in block.inputs]
    outputs = [(code(each.name), each.description) for each in block.intermediate_outputs]
    return template("block").substitute(
        name=card.name,
        title=card.title,
        namespace=namespace,
        version=version,
        bundle=bundle,
        base_model=SDXL,
        call=card.call,
        class_name=card.cls.__name__,
        summary=(inspect.getdoc(card.cls.mixin) or "").partition("Args:")[0].strip(),
        paper=texts["paper"].template,
        bibtex=texts["bibtex"].template,
        requirements=" ".join(f'"{requirement}"' for requirement in REQUIREMENTS),
        inputs=table(("Input", "Meaning"), inputs),
        outputs=table(("Output", "Meaning"), outputs),
        settings=table(("Setting", "Default", "Meaning"), settings(METHODS.find(card.room))),
    )
