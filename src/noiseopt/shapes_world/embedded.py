"""The trained models of the shapes world by name: what they are, how they are called, and where their weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"
NAMESPACE = "noiseopt"


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """One trained model.

    Attributes:
        name: Its folder under `weights`.
        title: What it is, in a line.
        call: Arguments its pipeline is meant to be called with; empty for what is no pipeline.
        in_wheel: Whether an installed package carries the weights; the others are in a checkout or on the Hub.
    """

    name: str
    title: str
    call: Mapping[str, Any] = field(default_factory=dict)
    in_wheel: bool = False

    @property
    def hub_id(self) -> str:
        """Where the weights are published."""
        return f"{NAMESPACE}/shapes-{self.name}"

    @property
    def is_pipeline(self) -> bool:
        """Whether it draws pictures."""
        return bool(self.call)


_ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}
_GUIDED = {"num_inference_steps": 6, "guidance_scale": 3.0}

MODELS = {
    model.name: model
    for model in (
        EmbeddedModel(name="turbo", title="one-step student of the SD kind", call=_ONE_STEP, in_wheel=True),
        EmbeddedModel(name="guided", title="guided model of the SD kind", call=_GUIDED, in_wheel=True),
        EmbeddedModel(name="sdxl", title="guided model of the SDXL kind", call=_GUIDED),
        EmbeddedModel(name="sdxl-turbo", title="one-step student of the SDXL kind", call=_ONE_STEP),
        EmbeddedModel(
            name="sd3", title="guided flow-matching model of the SD3 kind", call=_GUIDED | {"max_sequence_length": 16}
        ),
        EmbeddedModel(name="clip", title="dual encoder, the reward", in_wheel=True),
        EmbeddedModel(name="dinov2", title="image tower that no method optimises, for held-out features"),
        EmbeddedModel(name="vqa", title="vision-language model that answers yes or no"),
    )
}


def path(name: str) -> str:
    """The folder of a trained model, for `from_pretrained`; downloaded from the Hub if it is not at hand.

    Args:
        name: A key of `MODELS`.
    """
    if name not in MODELS:
        raise ValueError(f"Expected one of {', '.join(map(repr, MODELS))}, but got {name!r}.")
    folder = WEIGHTS / name
    if folder.is_dir():
        return str(folder)
    from huggingface_hub import snapshot_download

    return snapshot_download(MODELS[name].hub_id)
