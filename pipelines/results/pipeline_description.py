"""The state of a pipeline that its images depend on, as JSON values: model, scheduler, adapters."""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...private_names import name_or_path

LONGEST_LIST = 1000  # numbers of an array that is recorded, such as sigmas
PROBED = 16  # entries of each weight that tell one adapter from another
PROBED_WEIGHTS = 4  # weights of a module that tell one model from another
PIPELINE_FACTS = ("model", "revision", "scheduler", "weights", "adapters", "fused_adapters", "ip_adapter_scale")


def describe_pipeline(pipe) -> dict[str, Any]:
    """Return what a result records of its pipeline, beside its class and dtype.

    Returns:
        `model`, `revision`, the class and settings of the `scheduler`, a hash of some `weights` by component, the
        active LoRA `adapters` by component and name (weight, and a hash of their first entries), the names of
        `fused_adapters`, and the scales of IP-Adapters as `ip_adapter_scale`.
    """
    scheduler = pipe.scheduler
    settings = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    adapters = {name: found for name, module in modules.items() if (found := describe_adapters(module))}
    return {
        "model": portable_name(name_or_path(pipe)),
        "revision": revision_of(pipe),
        "scheduler": {"class": type(scheduler).__name__, **plain(settings)},
        "weights": {name: weights_hash(module) for name, module in modules.items()},
        "adapters": adapters,
        "fused_adapters": sorted(getattr(pipe, "fused_loras", ())),
        "ip_adapter_scale": ip_adapter_scales(modules.values()),
    }


def weights_hash(module: nn.Module) -> str:
    """Return a hash of the first entries of a few weights, which training or loading others changes.

    Adapters do not count, nor weights that are offloaded to meta tensors.
    """
    adapters = {name for layer in module.modules() for name in getattr(layer, "adapter_layer_names", ())}
    weights = [
        weight
        for name, weight in module.named_parameters()
        if not (weight.is_meta or adapters.intersection(name.split(".")))
    ]
    digest = hashlib.sha256()
    for weight in weights[:: max(1, len(weights) // PROBED_WEIGHTS)]:
        digest.update(weight.detach().flatten()[:PROBED].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_adapters(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the weight of each active LoRA adapter of a module, or those of its layers, and a hash of the adapter."""
    weights: dict[str, dict[float, None]] = {}  # as ordered sets
    hashes: dict[str, Any] = {}
    for place, layer, adapter, parameters in active_adapters(module):
        weights.setdefault(adapter, {})[weight_of(layer, adapter)] = None
        digest = hashes.setdefault(adapter, hashlib.sha256())
        digest.update(place.encode())
        for parameter in parameters:
            if not parameter.is_meta:
                digest.update(parameter.detach().flatten()[:PROBED].to("cpu", torch.float32).numpy().tobytes())
    listed = {adapter: list(each) for adapter, each in weights.items()}
    return {
        adapter: {"weight": each[0] if len(each) == 1 else each, "sha256": hashes[adapter].hexdigest()}
        for adapter, each in listed.items()
    }


def weight_of(layer: Any, adapter: str) -> float:
    """Return the weight of an adapter in a layer, by which PEFT multiplies α/r, or α/√r."""
    scaling = getattr(layer, "scaling", {}).get(adapter)
    alpha = getattr(layer, "lora_alpha", getattr(layer, "alpha", {})).get(adapter)  # of LoRA, and of LoHa and LoKr
    rank = getattr(layer, "r", {}).get(adapter)
    if scaling is None or not alpha or not rank:  # a kind of adapter without weights
        return 1.0
    unit = alpha / (math.sqrt(rank) if getattr(layer, "use_rslora", {}).get(adapter) else rank)
    return round(float(scaling) / unit, 6)


def active_adapters(module: nn.Module) -> Iterator[tuple[str, Any, str, list[nn.Parameter]]]:
    """Yield (name of a layer, layer, adapter, its parameters) for the layers that PEFT has put into a module."""
    for place, layer in module.named_modules():
        found: Any = layer
        if hasattr(found, "adapter_layer_names") and not found.disable_adapters:
            named = [(name.split("."), parameter) for name, parameter in found.named_parameters()]
            for adapter in found.active_adapters:
                parameters = [each for parts, each in named if adapter in parts and parts[0] != "base_layer"]
                if parameters:
                    yield place, found, adapter, parameters


def ip_adapter_scales(modules: Any) -> list[Any]:
    """Return the different scales of the IP-Adapters in the attention layers of modules."""
    processors = (getattr(layer, "processor", None) for module in modules for layer in module.modules())
    found: list[Any] = []
    for processor in processors:
        scale = getattr(processor, "scale", None) if hasattr(processor, "to_k_ip") else None
        if scale is not None and (each := plain({"scale": scale}).get("scale")) not in found:
            found.append(each)
    return found


def revision_of(pipe) -> str | None:
    """Return the commit of the Hub snapshot that the modules were loaded from, if any."""
    for component in pipe.components.values():
        if match := re.search(r"snapshots[/\\]([0-9a-f]{40})", name_or_path(component) or ""):
            return match[1]
    return None


def portable_name(source: str | None) -> str | None:
    """Return the name of a model without its place on this machine.

    A Hub id and a relative path stay as they are. Of an absolute path the last part is left; a folder in the Hub's
    cache becomes the Hub id, and one of the models of the shapes world keeps its place in the package.
    """
    if not source or not (os.path.isabs(source) or re.match(r"~|[A-Za-z]:[/\\]", source)):
        return source
    parts = re.split(r"[/\\]", source.rstrip("/\\"))
    for part in parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return "/".join(parts[-3:] if parts[-3:-1] == ["shapes_world", "weights"] else parts[-1:])


def portable(value: Any) -> Any:
    """Return nested plain values with each text as its `portable_name`."""
    if isinstance(value, Mapping):
        return {name: portable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [portable(each) for each in value]
    return portable_name(value) if isinstance(value, str) else value


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are JSON values or can be written as such: tuples, numbers of numpy, lists of these."""
    found = {}
    for name, value in values.items():
        try:
            found[name] = plain_value(value)
        except TypeError:
            continue
    return found


def plain_value(value: Any) -> Any:
    """Return a value as a JSON value. Raises `TypeError` for any other."""
    if hasattr(value, "tolist") and value.ndim <= 1 and value.nbytes <= LONGEST_LIST * value.itemsize:
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain_value(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): plain_value(each) for name, each in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"Expected a JSON value, but got {type(value).__name__}.")
