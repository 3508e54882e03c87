"""LoRA, IP-Adapter and textual inversion are honored in every evaluation and left unchanged."""

import pytest
import torch
from compositions import capture, check_composition, draw
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from problems import generator, redness
from tiers import slow_except
from tiny_pipelines import BUILDERS, call_arguments, quiet, sd_pipeline, sdxl_pipeline
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from noiseopt import NoiseResult, ReNO, optimize_noise

LORA = {  # family -> argument that scales adapters in a call, function that saves them, name of the denoiser
    "sdxl": ("cross_attention_kwargs", StableDiffusionXLPipeline.save_lora_weights, "unet"),
    "flux": ("joint_attention_kwargs", FluxPipeline.save_lora_weights, "transformer"),
}


def random_lora(module, seed: int) -> dict[str, torch.Tensor]:
    """Return random weights of an adapter; the initial ones of PEFT have no effect."""
    targets = ["to_q", "to_v", "q_proj", "v_proj"]
    module.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets), "made")
    state = get_peft_model_state_dict(module, adapter_name="made")
    return {name: torch.randn(value.shape, generator=generator(seed)) * 0.3 for name, value in state.items()}


@pytest.fixture(scope="module", params=slow_except(LORA, "sdxl"))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """Save two adapters of the denoiser and the first text encoder as "one.safetensors" and "two.safetensors"."""
    folder = tmp_path_factory.mktemp("lora")
    _, save, denoiser = LORA[family]
    for seed, name in enumerate(("one", "two")):
        pipe = BUILDERS[family]()
        layers = {f"{part}_lora_layers": random_lora(getattr(pipe, part), seed) for part in (denoiser, "text_encoder")}
        save(folder, **layers, weight_name=f"{name}.safetensors")
    return folder


@pytest.fixture
def adapted(family, folder):
    """Return a pipeline with both adapters loaded and the first active."""
    pipe = BUILDERS[family]()
    for name in ("one", "two"):
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["one"])
    return quiet(pipe)


def test_lora_scales_are_honored_and_kept(adapted, family):
    arguments = call_arguments(family)
    drawn = {}
    for name, setting in {
        "one": (["one"], [1.0]),
        "half": (["one"], [0.5]),
        "both": (["one", "two"], [0.5, 2.0]),
    }.items():
        adapted.set_adapters(*setting)
        drawn[name] = draw(adapted, **arguments)
    check_composition(adapted, **arguments)
    assert adapted.get_active_adapters() == ["one", "two"]
    scaled = {**arguments, LORA[family][0]: {"scale": 0.25}}
    drawn["quarter of both"] = draw(adapted, **scaled)
    check_composition(adapted, **scaled)
    adapted.disable_lora()
    drawn["none"] = draw(adapted, **arguments)
    check_composition(adapted, **arguments)
    pairs = [(a, b) for a in drawn for b in drawn if a < b]
    assert not [pair for pair in pairs if torch.equal(*(drawn[name] for name in pair))]


def test_a_result_records_its_adapters_and_tells_a_pipeline_without_them(adapted, family, tmp_path):
    """Another weight, another adapter, another adapter of the same name, none, and a fused one."""
    denoiser, arguments = LORA[family][2], call_arguments(family)
    adapted.set_adapters(["one", "two"], [0.5, 2.0])
    optimize_noise(adapted, "a b", ReNO(rewards="red", steps=1), **arguments).save(tmp_path / "x")
    result = NoiseResult.load(tmp_path / "x")
    found = result.provenance["adapters"]
    assert {part: {name: each["weight"] for name, each in found[part].items()} for part in found} == {
        part: {"one": 0.5, "two": 2.0} for part in (denoiser, "text_encoder")
    }
    assert result.differences(adapted) == []
    adapted.set_adapters(["one", "two"], [0.5, 1.0])
    assert f"adapters {denoiser} two weight was 2.0 and is 1.0" in result.differences(adapted)
    adapted.set_adapters(["one"])
    assert any(told.startswith(f"adapters {denoiser} two was") for told in result.differences(adapted))
    adapted.set_adapters(["one", "two"], [0.5, 2.0])
    layer = next(value for name, value in getattr(adapted, denoiser).named_parameters() if ".lora_B.one." in name)
    with torch.no_grad():
        layer += 1
    (told,) = result.differences(adapted)
    assert told.startswith(f"adapters {denoiser} one sha256 was")
    adapted.disable_lora()
    assert any(told.startswith(f"adapters {denoiser} was") for told in result.differences(adapted))
    adapted.enable_lora()
    adapted.fuse_lora(adapter_names=["one"])
    assert "fused_adapters was [] and is ['one']" in result.differences(adapted)


def test_fused_lora_is_the_loaded_one_and_is_unfused_to_the_weights_before(adapted, family):
    arguments = call_arguments(family)
    loaded = draw(adapted, **arguments)
    adapted.fuse_lora(adapter_names=["one"])
    torch.testing.assert_close(draw(adapted, **arguments), loaded, rtol=0, atol=1e-4)
    check_composition(adapted, **arguments)
    adapted.unfuse_lora()
    torch.testing.assert_close(draw(adapted, **arguments), loaded, rtol=0, atol=1e-4)


def test_adapters_take_no_gradient_and_can_be_trained_afterwards(adapted, family):
    denoiser = getattr(adapted, LORA[family][2])
    layers = {name: value for name, value in denoiser.named_parameters() if "lora" in name}
    for name, parameter in layers.items():
        parameter.requires_grad_(".one." in name)
    learning = []

    def reward(images, prompts):
        learning.append(any(parameter.requires_grad for parameter in layers.values()))
        return redness(images, prompts)

    method = ReNO(rewards=reward, steps=2)
    optimize_noise(adapted, "a b", method, generator=generator(), **call_arguments(family))
    assert learning[-1] is False
    assert {name for name, parameter in layers.items() if parameter.requires_grad} == {
        n for n in layers if ".one." in n
    }
    assert all(parameter.grad is None for parameter in layers.values())


def ip_adapter_of(unet, image_size: int, tokens: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """Return random weights of an IP-Adapter in the published layout."""
    text_size = unet.config.cross_attention_dim
    shapes = {"proj.weight": (tokens * text_size, image_size), "proj.bias": (tokens * text_size,)}
    shapes |= {"norm.weight": (text_size,), "norm.bias": (text_size,)}
    attentions = [
        unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors if "attn2" in name
    ]
    draws = generator(3)
    keys = {}
    for index, attention in enumerate(attentions):
        for part in ("k", "v"):
            keys[f"{2 * index + 1}.to_{part}_ip.weight"] = torch.randn(attention.to_k.weight.shape, generator=draws)
    projection = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    return {"image_proj": projection, "ip_adapter": keys}


@pytest.fixture(scope="module", params=[sd_pipeline, sdxl_pipeline], ids=["sd", "sdxl"])
def with_image(request):
    """Return a pipeline with an IP-Adapter."""
    pipe = request.param()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=16, **sizes))
    edge = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pipe.register_modules(image_encoder=encoder, feature_extractor=CLIPImageProcessorPil(**edge))
    pipe.load_ip_adapter(ip_adapter_of(pipe.unet, 16), subfolder=None, weight_name=None)
    pipe.set_ip_adapter_scale(0.6)
    return quiet(pipe)


def test_ip_adapter_images_are_honored_in_every_evaluation(with_image):
    image, other = torch.rand(2, 1, 3, 32, 32, generator=generator(4))
    arguments = {**call_arguments("sd"), "ip_adapter_image": image}
    assert not torch.equal(draw(with_image, **arguments), draw(with_image, **{**arguments, "ip_adapter_image": other}))
    check_composition(with_image, **arguments)
    embeds = with_image.prepare_ip_adapter_image_embeds(image, None, "cpu", 1, True)
    encoded = {**call_arguments("sd"), "ip_adapter_image_embeds": embeds}
    torch.testing.assert_close(draw(with_image, **encoded), draw(with_image, **arguments), rtol=0, atol=1e-5)
    check_composition(with_image, **encoded)


def test_ip_adapter_images_are_encoded_once_a_run(with_image):
    calls = []
    handle = with_image.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    image = torch.rand(1, 3, 32, 32, generator=generator(4))
    draw(with_image, ip_adapter_image=image, **call_arguments("sd"))
    plain = len(calls)
    method = ReNO(rewards=redness, steps=3)
    optimize_noise(with_image, "a b", method, ip_adapter_image=image, **call_arguments("sd"))
    handle.remove()
    assert len(calls) - plain <= 2 * plain


def test_ip_adapter_images_of_several_are_not_told_apart_in_chunks(with_image):
    method = ReNO(rewards=redness, steps=1, chunk_size=1)
    arguments = {**call_arguments("sd"), "ip_adapter_image": torch.rand(1, 3, 32, 32)}
    with pytest.raises(ValueError, match="`ip_adapter_image`.*chunk_size=None"):
        optimize_noise(with_image, ["a", "b"], method, **arguments)


def test_textual_inversion_is_honored_and_rewards_read_the_prompt_as_written():
    pipe = quiet(sd_pipeline())
    arguments = call_arguments("sd")
    unknown = draw(pipe, "a <cat>", **arguments)
    vectors = torch.randn(2, 16, generator=generator(5))
    pipe.load_textual_inversion({"<cat>": vectors}, token="<cat>")
    quiet(pipe)
    assert not torch.equal(draw(pipe, "a <cat>", **arguments), unknown)
    check_composition(pipe, "a <cat>", **arguments)
    read = []

    def reward(images, prompts):
        read.extend(prompts)
        return redness(images, prompts)

    optimize_noise(pipe, "a <cat>", ReNO(rewards=reward, steps=1), **arguments)
    assert set(read) == {"a <cat>"}
    sampler, noise, _ = capture(pipe, "a <cat>", **arguments)
    assert torch.equal(sampler.images(noise), draw(pipe, "a <cat>", **arguments))
