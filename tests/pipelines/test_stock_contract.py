"""Demands of diffusers' own tests on every pipeline class, made on ours.

After `test_pipeline_call_signature`, `test_encode_prompt_works_in_isolation` and IP-Adapter's `test_pipeline_signature`
in https://github.com/huggingface/diffusers, `tests/pipelines/test_pipelines_common.py`.
"""

import ast
import inspect
import textwrap
from typing import Any

import pytest
import torch
from diffusers.loaders import FluxIPAdapterMixin, IPAdapterMixin, SD3IPAdapterMixin
from problems import generator
from tiny_pipelines import BUILDERS, call_arguments, quiet

import noiseopt

STOCK = {type(build()): family for family, build in BUILDERS.items()}
CLASSES = {name: getattr(noiseopt, name) for name in noiseopt.__all__ if name.endswith("Pipeline")}
REQUIRED = {"prompt", "height", "width", "guidance_scale", "prompt_embeds"}
OPTIONAL = {"num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict"}
KNOWN = {"device": torch.device("cpu"), "do_classifier_free_guidance": True}  # no arguments of the call
IP_ADAPTERS = (IPAdapterMixin, SD3IPAdapterMixin, FluxIPAdapterMixin)


@pytest.fixture(params=CLASSES)
def cls(request) -> Any:
    return CLASSES[request.param]


def family_of(cls: type) -> str:
    return next(family for stock, family in STOCK.items() if issubclass(cls, stock))


def test_the_signature_of_the_call_names_what_a_text_to_image_pipeline_takes(cls):
    parameters = inspect.signature(cls.__call__).parameters
    optional = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    assert parameters.keys() >= REQUIRED and optional >= OPTIONAL
    assert not parameters.keys() & {"args", "arguments"}


def test_the_signature_of_a_class_with_ip_adapters_names_their_images(cls):
    assert issubclass(cls, IP_ADAPTERS)
    assert inspect.signature(cls.__call__).parameters.keys() >= {"ip_adapter_image", "ip_adapter_image_embeds"}


def returned_names(function: Any) -> list[str]:
    """Return the names in the last return statement of a method, read from its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    returns = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    (names,) = {ast.unparse(value) for value in returns if value is not None}
    return [name.strip() for name in names.strip("()").split(",")]


def test_prompts_are_encoded_by_a_pipeline_of_text_encoders_alone(cls):
    """The signature and the source of `encode_prompt` are the stock ones, and its embeddings give the same image."""
    family = family_of(cls)
    components = BUILDERS[family]().components
    # the tiny SD3 has no T5, and the pipeline asks the transformer for its width
    needed = ("text", "tokenizer", *(["transformer"] if family == "sd3" else []))
    texts = {name: part if name.startswith(needed) else None for name, part in components.items()}
    alone, whole = cls(**texts), quiet(cls(**components))
    parameters, call = (inspect.signature(method).parameters for method in (cls.encode_prompt, cls.__call__))
    assert list(parameters)[1] == "prompt" and not parameters.keys() & {"args", "kwargs"}
    arguments = {"prompt": "a b", **call_arguments(family), **({"steps": 0} if cls.__name__.startswith("CNO") else {})}
    inputs = {name: value for name, value in arguments.items() if name in parameters}
    for name, parameter in list(parameters.items())[1:]:
        if parameter.default is inspect.Parameter.empty and name not in inputs:
            inputs[name] = KNOWN[name] if name in KNOWN else call[name].default
    with torch.no_grad():
        encoded = dict(zip(returned_names(cls.encode_prompt), alone.encode_prompt(**inputs), strict=True))
    given = {name: value for name, value in encoded.items() if name in call and value is not None}
    assert "prompt_embeds" in given
    rest = {name: value for name, value in arguments.items() if name not in inputs or "prompt" not in name}
    found = whole(**given, **rest, generator=generator(), output_type="pt").images
    expected = whole(**arguments, generator=generator(), output_type="pt").images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
