"""Checkpoints in foreign layouts: where their files are, how they are read, and what must be in them."""

import json
import os
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


def checkpoint_path(checkpoint: str, filename: str, hub: Mapping[str, Any]) -> Path:
    """The file of a folder or a Hub repository, downloaded if need be.

    Args:
        checkpoint: a folder or a Hub id.
        filename: the file in it.
        hub: revision, cache_dir, token and local_files_only, as `Reward.load` gets them.

    Raises:
        OSError: a folder without that file, or a download that fails.
    """
    if not os.path.isdir(checkpoint):
        return Path(hf_hub_download(checkpoint, filename, **hub))
    path = Path(checkpoint) / filename
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the file {filename} in {checkpoint}, but it is not there. Pass the folder that holds it, or a "
            "Hub id."
        )
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a pickled one, in which nothing but tensors is ever executed.

    Raises:
        ValueError: a pickle that holds more than tensors and plain values, a damaged file, or no tensors by name.
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
    except Exception as error:  # the restricted unpickler stumbles over damaged files in every way
        raise ValueError(
            f"Expected a file of tensors, but {path.name} cannot be read with `weights_only=True`: "
            f"{str(error).partition(chr(10))[0]} Download it again, or convert it to safetensors where you trust it."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(type(key) is str and isinstance(state[key], Tensor) for key in state):
        raise ValueError(f"Expected {path.name} to hold tensors by name, but it holds {type(state).__name__}.")
    return state


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` for anything else."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON in {path.name}, but it cannot be read: {error}. Download it again.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"Expected an object in {path.name}, but got {type(settings).__name__}. Download it again.")
    return settings


def holder_of(filename: str, checkpoint: str, companion: str, hub: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a part is read from that some checkpoints leave to another repository, such as a tokenizer.

    Args:
        filename: the file that shows whether `checkpoint`, a folder, has the part itself.
        checkpoint: a folder or a Hub id; a repository on the Hub is never asked.
        companion: the Hub id of the part otherwise.

    Returns:
        `checkpoint` or `companion`, and the arguments to load from it: a revision is one of the checkpoint alone.
    """
    if os.path.isfile(os.path.join(checkpoint, filename)):
        return checkpoint, dict(hub)
    return companion, {**hub, "revision": None}


def load_pretrained(model_class: type[ModelT], checkpoint: str, hub: Mapping[str, Any]) -> ModelT:
    """A transformers model in float32. What a checkpoint lacks, transformers draws at random and only warns of.

    Raises:
        ValueError: naming the keys that are missing.
    """
    load: Any = model_class.from_pretrained  # whose type does not know that it then gives a pair
    model, found = load(checkpoint, dtype=torch.float32, output_loading_info=True, **hub)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"Expected {checkpoint} to hold all weights of {type(model).__name__}, but missing: {', '.join(missing)}. "
            "Pass the checkpoint of a whole model."
        )
    return model


def check_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """See that `state` holds exactly the weights of `module`, whose own values do not matter: it may be a meta one.

    Raises:
        ValueError: naming the keys that are missing or not expected, or the shapes that differ.
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
    """Copy `state` into `module`.

    Raises:
        ValueError: as `check_weights` does.
    """
    check_weights(module, state, source)
    module.load_state_dict(state)
