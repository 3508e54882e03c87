"""Loading and checking of checkpoints that transformers alone does not load or check."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

ModelT = TypeVar("ModelT", bound=PreTrainedModel)
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"


def is_checkpoint(name_or_path: str) -> bool:
    """Return whether a string is an existing folder or has the form of a Hub id, `org/name`."""
    return os.path.isdir(name_or_path) or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name_or_path) is not None


def checkpoint_path(checkpoint: str, filename: str, hub: Mapping[str, Any]) -> Path:
    """Return the path of a file in a folder or a Hub repository, downloading it if needed.

    Args:
        checkpoint: A folder or a Hub id.
        filename: The name of the file.
        hub: revision, cache_dir, token and local_files_only, as passed to `Reward.load`.

    Raises:
        OSError: If the folder does not contain the file or the download fails.
    """
    if not os.path.isdir(checkpoint):
        return Path(hf_hub_download(checkpoint, filename, **hub))
    path = Path(checkpoint) / filename
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the file {filename} in {checkpoint}, but it is not there. Pass the folder that contains it, or "
            "a Hub id."
        )
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file, or of a pickle with `weights_only=True`, so that no code runs.

    Raises:
        ValueError: If a pickle contains more than tensors and plain values, if the file is damaged, or if it is not a
            dict of tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"Expected a safetensors file in {path.name}: {error}. Download it again.") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the restricted unpickler raises many types for damaged files
        raise ValueError(
            f"Expected a file of tensors, but {path.name} cannot be read with `weights_only=True`: "
            f"{str(error).partition(chr(10))[0]} Download it again, or convert it to safetensors where you trust it."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(type(key) is str and isinstance(state[key], Tensor) for key in state):
        raise ValueError(f"Expected {path.name} to hold tensors by name, but it holds {type(state).__name__}.")
    return state


def read_settings(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises `ValueError` for anything else."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON in {path.name}, but it cannot be read: {error}. Download it again.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"Expected an object in {path.name}, but got {type(settings).__name__}. Download it again.")
    return settings


def holder_of(filename: str, checkpoint: str, companion: str, hub: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the source of a component, such as a tokenizer, that some checkpoints take from another repository.

    Args:
        filename: The file whose presence shows that `checkpoint`, if a folder, contains the component.
        checkpoint: A folder or a Hub id. Hub repositories are not searched.
        companion: The Hub id to fall back to.
        hub: revision, cache_dir, token and local_files_only, as passed to `Reward.load`.

    Returns:
        `checkpoint` or `companion`, and the arguments to load from it. `revision` applies to `checkpoint` only.
    """
    if is_in_folder(filename, checkpoint):
        return checkpoint, dict(hub)
    return companion, {**hub, "revision": None}


def is_in_folder(filename: str, folder: str) -> bool:
    """Return whether a folder has a file, or its content in the file of a whole processor.

    transformers 5 saves the image processor of a `CLIPProcessor` as part of `processor_config.json`. Older files of
    that name have no such part.
    """
    if os.path.isfile(os.path.join(folder, filename)):
        return True
    whole = Path(folder) / "processor_config.json"
    return filename == IMAGE_PROCESSOR_FILE and whole.is_file() and "image_processor" in read_settings(whole)


def load_pretrained(model_class: type[ModelT], checkpoint: str, hub: Mapping[str, Any]) -> ModelT:
    """Load a transformers model in float32, with all of its weights.

    transformers itself initializes missing weights randomly and only warns.

    Raises:
        ValueError: If weights are missing; the message lists their keys.
    """
    load: Any = model_class.from_pretrained  # its annotation omits the pair that `output_loading_info` returns
    model, found = load(checkpoint, dtype=torch.float32, output_loading_info=True, **hub)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"Expected {checkpoint} to hold all weights of {type(model).__name__}, but missing: {', '.join(missing)}. "
            "Pass the checkpoint of a complete model."
        )
    return model


def check_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Check that the keys and shapes of `state` are exactly those of `module`, which may be on the meta device.

    Raises:
        ValueError: For missing or unexpected keys and for different shapes; the message lists them.
    """
    own = module.state_dict()
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in shapes],
    }
    found = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
    if found:
        raise ValueError(f"Expected {source} to hold exactly the weights of {type(module).__name__}, but {found}.")


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`. Raises `ValueError` as `check_weights` does."""
    check_weights(module, state, source)
    module.load_state_dict(state)
