"""The trained models of the shapes world by name, and the location of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..registry import did_you_mean

WEIGHTS = Path(__file__).parent / "weights"
NAMESPACE = "noiseopt"


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """A trained model.

    Attributes:
        name: Its folder under `weights`.
        title: A one-line description.
        call: Recommended arguments of its pipeline's call; empty if it is not a pipeline.
        in_wheel: Whether the wheel includes the weights, as it does those of the demos. Others are in a checkout or on
            the Hub.
    """

    name: str
    title: str
    call: Mapping[str, Any] = field(default_factory=dict)
    in_wheel: bool = False

    @property
    def hub_id(self) -> str:
        """The Hub id of the weights."""
        return f"{NAMESPACE}/shapes-{self.name}"

    @property
    def is_pipeline(self) -> bool:
        """Return whether the model generates images."""
        return bool(self.call)


_ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}
_GUIDED = {"num_inference_steps": 20, "guidance_scale": 5.0}

MODELS = {
    model.name: model
    for model in (
        EmbeddedModel(name="turbo", title="one-step student of the SD kind", call=_ONE_STEP, in_wheel=True),
        EmbeddedModel(name="guided", title="guided model of the SD kind", call=_GUIDED, in_wheel=True),
        EmbeddedModel(name="sdxl", title="guided model of the SDXL kind", call=_GUIDED),
        EmbeddedModel(name="sdxl-turbo", title="one-step student of the SDXL kind", call=_ONE_STEP),
        EmbeddedModel(
            name="sd3",
            title="guided flow-matching model of the SD3 kind, whose third text encoder says nothing",
            call=_GUIDED | {"guidance_scale": 3.0, "max_sequence_length": 16},
        ),
        EmbeddedModel(name="clip", title="dual encoder, the reward", in_wheel=True),
        EmbeddedModel(
            name="dinov2", title="image encoder that no method optimizes, for held-out features", in_wheel=True
        ),
        EmbeddedModel(name="vqa", title="vision-language model that answers yes or no", in_wheel=True),
    )
}


def load(name: str, **kwargs: Any) -> Any:
    """Load a trained model: a pipeline, a reward ("clip", "vqa") or features ("dinov2"), in float32 on the CPU.

    Unlike `DiffusionPipeline.from_pretrained(path(name))`, it prints nothing: diffusers notes that the autoencoder is a
    tiny one.

    Args:
        name: A key of `MODELS`.
        kwargs: Arguments of `from_pretrained`, such as `dtype=torch.bfloat16`.

    Raises:
        ValueError, FileNotFoundError: As `path` does.
    """
    from diffusers import DiffusionPipeline

    from ..quiet import quiet_libraries
    from ..rewards import AutoReward, ImageFeatures

    folder = path(name)
    loader = DiffusionPipeline if MODELS[name].is_pipeline else ImageFeatures if name == "dinov2" else AutoReward
    with quiet_libraries():
        return loader.from_pretrained(folder, **kwargs)


def path(name: str) -> str:
    """Return the folder of a trained model for `from_pretrained`, downloaded from the Hub if necessary.

    Args:
        name: A key of `MODELS`.

    Raises:
        ValueError: For an unknown name.
        FileNotFoundError: If the weights are neither in the package nor in the Hub's cache and cannot be downloaded.
    """
    if name not in MODELS:
        raise ValueError(
            f"Expected one of {', '.join(map(repr, MODELS))}, but got {name!r}.{did_you_mean(name, MODELS)}"
        )
    folder = WEIGHTS / name
    return str(folder) if folder.is_dir() else download(MODELS[name])


def download(model: EmbeddedModel) -> str:
    """Return a model's folder in the Hub's cache, downloaded if necessary. Raises `FileNotFoundError`."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model.hub_id)
    except OSError as error:  # no connection, offline without a cached copy, or no such repository
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        carried = ", ".join(other.name for other in MODELS.values() if other.in_wheel)
        raise FileNotFoundError(
            f"Expected the weights of {model.name!r} in {WEIGHTS / model.name} or on the Hub as {model.hub_id}, but "
            f"found neither: {reason}. An installed package includes only {carried}: use a checkout of the repository, "
            f"or download once with `hf download {model.hub_id}`."
        ) from error
