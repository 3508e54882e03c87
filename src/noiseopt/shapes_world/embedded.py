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
        load: Arguments its `from_pretrained` needs: what the pipeline has no weights for.
        in_wheel: Whether an installed package carries the weights; the others are in a checkout or on the Hub.
    """

    name: str
    title: str
    call: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
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
_GUIDED = {"num_inference_steps": 6, "guidance_scale": 2.0}

MODELS = {
    model.name: model
    for model in (
        EmbeddedModel(name="turbo", title="one-step student of the SD kind", call=_ONE_STEP, in_wheel=True),
        EmbeddedModel(name="guided", title="guided model of the SD kind", call=_GUIDED, in_wheel=True),
        EmbeddedModel(name="sdxl", title="guided model of the SDXL kind", call=_GUIDED),
        EmbeddedModel(name="sdxl-turbo", title="one-step student of the SDXL kind", call=_ONE_STEP),
        EmbeddedModel(
            name="sd3",
            title="guided flow-matching model of the SD3 kind, without its third text encoder",
            call=_GUIDED | {"max_sequence_length": 16},
            load={"text_encoder_3": None, "tokenizer_3": None},
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

    Raises:
        ValueError: For another name.
        FileNotFoundError: If they are neither in the package nor in the Hub's cache and cannot be downloaded.
    """
    if name not in MODELS:
        raise ValueError(f"Expected one of {', '.join(map(repr, MODELS))}, but got {name!r}.")
    folder = WEIGHTS / name
    return str(folder) if folder.is_dir() else download(MODELS[name])


def download(model: EmbeddedModel) -> str:
    """The folder of a model in the Hub's cache, which is filled if it has to be. Raises `FileNotFoundError`."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model.hub_id)
    except OSError as error:  # no connection, offline mode without a copy in the cache, no such repository
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        carried = ", ".join(other.name for other in MODELS.values() if other.in_wheel)
        raise FileNotFoundError(
            f"Expected the weights of {model.name!r} in {WEIGHTS / model.name} or on the Hub as {model.hub_id}, but "
            f"found neither: {reason}. An installed package carries {carried} only: use a checkout of the repository, "
            f"or download once with `hf download {model.hub_id}`."
        ) from error
