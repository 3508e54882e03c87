"""Private names of libraries: each one exists in the installed versions, and a missing one is reported by name."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import HookRegistry, ModelHook
from tiny_pipelines import SIZE, quiet, sd_pipeline, tiny_pipeline, tiny_unet

from noiseopt import private_names


def test_a_missing_name_is_reported_with_its_library():
    with pytest.raises(ImportError, match="Expected diffusers to have the private name `_gone`, but version .* Tensor"):
        private_names.private(torch.zeros(1), "_gone", "diffusers")


def test_attributes_of_pipelines():
    pipe = quiet(sd_pipeline())
    assert private_names.execution_device(pipe) == torch.device("cpu")
    pipe("a", num_inference_steps=3, output_type="latent", **SIZE)
    assert private_names.own_timestep_count(pipe) == 3 and not pipe.interrupt
    private_names.interrupt(pipe)
    assert pipe.interrupt


def test_names_of_loaded_components(tmp_path):
    tiny_unet(16).save_pretrained(tmp_path)
    loaded = type(tiny_unet(16)).from_pretrained(tmp_path)
    assert private_names.name_or_path(loaded) == str(tmp_path) and private_names.name_or_path(object()) is None


def test_hooks_of_accelerate_and_diffusers():
    module = add_hook_to_module(torch.nn.Linear(1, 1), hook := AlignDevicesHook())
    assert private_names.accelerate_hook(module) is hook
    assert private_names.accelerate_hook(torch.nn.Linear(1, 1)) is None
    HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "ours")
    (name, found), *others = private_names.diffusers_hooks(module).items()
    assert name == "ours" and not others and private_names.is_stateful(found) is False


def test_attention_backends():
    found = {
        family: {private_names.attention_backend_of(module) for module in denoiser.modules()}
        for family, denoiser in {"sd": tiny_pipeline("sd").unet, "flux": tiny_pipeline("flux").transformer}.items()
    }
    assert found == {"sd": {None}, "flux": {None, "native"}}  # the attention of U-Nets does not dispatch


def test_settings_of_blocks_are_those_of_diffusers():
    """Our settings have the effect of `enable_gradient_checkpointing`, and are removed without a trace."""
    unet, calls = tiny_unet(16), []

    def checkpoint(module, *inputs):
        calls.append(module)
        return module(*inputs)

    blocks = [module for module in unet.modules() if hasattr(module, "gradient_checkpointing")]
    before = [private_names.block_settings(block) for block in blocks]
    for block in blocks:
        private_names.checkpoint_blocks(block, checkpoint)
    assert private_names.supports_block_checkpointing(unet) and unet.is_gradient_checkpointing
    x = torch.randn(1, 4, 16, 16).requires_grad_()
    unet(x, 1, torch.zeros(1, 3, unet.config.cross_attention_dim))
    assert calls
    for block, settings in zip(blocks, before, strict=True):
        private_names.replace_block_settings(block, settings)
    assert not unet.is_gradient_checkpointing
    assert [private_names.block_settings(block) for block in blocks] == before


@pytest.mark.slow
def test_compiled_modules():
    module = torch.nn.Linear(1, 1)
    assert not private_names.is_compiled(module) and private_names.is_compiled(torch.compile(torch.nn.Linear(1, 1)))
    module.compile()
    assert private_names.is_compiled(module)


def test_modules_and_tensors_of_torch():
    x = torch.zeros(3)
    assert set(private_names.MODULE_CONTENTS) <= vars(torch.nn.Linear(1, 1)).keys()
    assert private_names.base_of_view(x[:2]) is x and private_names.base_of_view(x) is None
    version = private_names.version_of(x)
    assert private_names.version_of(x.add_(1)) == version + 1


def test_tensors_and_storages():
    x, y = torch.zeros(3), torch.zeros(2)
    assert [id(tensor) for tensor in private_names.tensors_in(({"a": x}, [y, "b"], 1))] == [id(x), id(y)]
    key = private_names.storage_key(x.untyped_storage())
    assert key == private_names.storage_key(x[1:].untyped_storage()) != private_names.storage_key(y.untyped_storage())
    with private_names.TorchDispatchMode() as mode:
        assert isinstance(mode, private_names.TorchDispatchMode)


def test_only_this_module_imports_private_modules():
    root = Path(private_names.__file__).parents[2]
    folders = ("src/noiseopt", "pipelines", "rewards", "callbacks", "schedulers", "benchmarks", "training")
    files = {file.resolve() for folder in folders for file in (root / folder).rglob("*.py")}
    private = re.compile(r"^\s*(?:from|import) \w[\w.]*\._[a-z]", re.MULTILINE)
    found = {file.name for file in files if private.search(file.read_text(encoding="utf-8"))}
    assert found == {"private_names.py"}
