"""Results on disk, and runs with non-finite numbers."""

import base64
import copy
import io
import re
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionPipeline
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from PIL import Image
from problems import generator, redness
from safetensors.torch import save_file
from tiny_pipelines import SIZE, call_arguments, save_tiny_clip, tiny_pipeline

from noiseopt import NoiseResult, ReNO, ReNOStableDiffusionPipeline, optimize_noise
from noiseopt.pipelines.results.pipeline_description import describe_adapters, plain, portable_name
from noiseopt.pipelines.results.settings_diff import plain_description, settings_diff

ARGUMENTS = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_loaded_result_redraws_the_best_image_exactly(family, tmp_path):
    pipe, arguments = tiny_pipeline(family), call_arguments(family)
    path = tmp_path / "results" / "found.safetensors"
    method = ReNO(rewards=redness, steps=3)
    result = optimize_noise(
        pipe, ["a", "b"], method, generator=[generator(1), generator(2)], **arguments | batch(family)
    )
    result.save(path)
    loaded = NoiseResult.load(path)
    for name in ("noise", "latents", "losses", "norms", "best_step"):
        assert torch.equal(getattr(loaded, name), getattr(result, name))
    assert loaded.provenance == result.provenance
    assert torch.equal(loaded.best_scores["redness"], result.best_scores["redness"])
    arguments |= batch(family)
    again = pipe(["a", "b"], latents=loaded.latents, generator=loaded.generator(), output_type="pt", **arguments).images
    assert torch.equal(again, result.images)


def batch(family: str) -> dict:
    return {"negative_prompt": ["b", "b"]} if family == "flux" else {}


def test_images_as_pil_and_in_a_notebook(tmp_path):
    pipe, arguments = tiny_pipeline("sd"), {**ARGUMENTS, "num_images_per_prompt": 2}
    result = optimize_noise(pipe, "a", ReNO(rewards=redness, steps=2), **arguments)
    drawn = pipe("a", latents=result.latents, **arguments).images
    assert [image.tobytes() for image in result.pil()] == [image.tobytes() for image in drawn]
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', result._repr_html_())
    shown = [Image.open(io.BytesIO(base64.b64decode(source))).tobytes() for source in sources]
    plain = (result.initial_images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    assert len(shown) == 4 and shown[1::2] == [image.tobytes() for image in drawn]
    assert shown[0::2] == [image.numpy().tobytes() for image in plain]
    result.provenance["decoder"] = {"class": "<script>"}
    assert "&lt;script&gt;" in result._repr_html_() and "<script" not in result._repr_html_()
    del result.provenance["decoder"]
    result.save(tmp_path / "result.safetensors")
    loaded = NoiseResult.load(tmp_path / "result.safetensors")
    assert "<img" not in loaded._repr_html_()
    with pytest.raises(ValueError, match="Expected a result with images, .* `pipe\\(prompt, latents="):
        loaded.pil()


def test_provenance_says_where_a_noise_came_from():
    arguments = {"generator": generator(7), "num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
    result = optimize_noise(tiny_pipeline("sd"), "a", ReNO(rewards={"red": 2.0, "green": 0.0}, steps=2), **arguments)
    found = result.provenance
    assert found["method"] == "ReNO" and found["settings"]["momentum"] == 0.9
    assert found["objective"] == {"red": 2.0, "green": 0.0}
    assert found["prompts"] == ["a"] and found["seeds"] == [7] and found["dtype"] == "float32"
    assert found["scheduler"]["class"] == "EulerDiscreteScheduler"
    assert found["arguments"] == {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
    assert set(found["versions"]) == {"python", "torch", "diffusers", "transformers"}
    assert found["steps"] == 2 and found["stopped"] is None


def test_a_pipeline_loaded_from_a_path_names_its_model(tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    result = optimize_noise(pipe, "a", ReNO(rewards="red", steps=1), **ARGUMENTS)
    result.save(tmp_path / "result.safetensors")
    found = NoiseResult.load(tmp_path / "result.safetensors").provenance
    assert found["model"] == "model" and str(tmp_path) not in str(found)


def test_no_place_on_this_machine_is_recorded(tmp_path, monkeypatch):
    """Neither that of the model and its scheduler, nor those of rewards, features and decoder."""
    clip = save_tiny_clip(tmp_path / "clip")
    tiny_pipeline("sd").save_pretrained(tmp_path / "model")
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**channels, **blocks).save_pretrained(tmp_path / "decoder")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    method = ReNO(rewards=clip, steps=1, decoder=str(tmp_path / "decoder"))
    result = optimize_noise(pipe, "/imagine a cat", method, **ARGUMENTS)
    assert str(tmp_path) not in str(result.provenance) and str(tmp_path) not in str(result.reports)
    assert result.provenance["prompts"] == ["/imagine a cat"]  # a text, not a path
    assert (
        result.provenance["settings"]["rewards"] == Path(clip).name
        and result.provenance["decoder"]["name"] == "decoder"
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("stabilityai/sdxl-turbo", "stabilityai/sdxl-turbo"),
        ("models/mine", "models/mine"),
        ("/home/me/models/mine/", "mine"),
        ("C:\\Users\\me\\mine", "mine"),
        ("~/mine", "mine"),
        ("/home/me/.cache/huggingface/hub/models--stabilityai--sdxl-turbo/snapshots/0a1b", "stabilityai/sdxl-turbo"),
        ("/x/noiseopt/shapes_world/weights/turbo", "shapes_world/weights/turbo"),
        (None, None),
    ],
)
def test_a_model_is_named_without_its_place(source, name):
    assert portable_name(source) == name


def test_arguments_of_numpy_are_recorded_as_numbers_and_the_others_are_named():
    arguments = {**ARGUMENTS, "guidance_scale": numpy.float32(0), "num_inference_steps": numpy.int64(1)}
    arguments |= {"timesteps": None, "cross_attention_kwargs": {"scale": numpy.float64(0.5)}, "eta": torch.tensor(0.0)}
    embeddings = {"prompt_embeds": torch.zeros(1, 77, 16), "negative_prompt_embeds": torch.zeros(1, 77, 16)}
    result = optimize_noise(tiny_pipeline("sd"), None, ReNO(rewards="red", steps=1), **arguments, **embeddings)
    found = result.provenance
    expected = {"guidance_scale": 0.0, "num_inference_steps": 1, "eta": 0.0, "cross_attention_kwargs": {"scale": 0.5}}
    assert found["arguments"] == {**SIZE, **expected, "timesteps": None}
    assert {type(found["arguments"][name]) for name in expected} == {float, int, dict}
    assert found["unrecorded"] == ["prompt_embeds", "negative_prompt_embeds"]


def test_small_arrays_are_lists_and_large_ones_are_not_recorded():
    values = {"sigmas": numpy.array([1.0, 0.5]), "size": (numpy.int64(64), 64), "image": numpy.zeros((64, 64, 3))}
    assert plain({**values, "callback": print}) == {"sigmas": [1.0, 0.5], "size": [64, 64]}


def test_settings_of_different_numbers_arrays_and_images_differ():
    for one, other in (
        (numpy.int64(3), numpy.int64(4)),
        (numpy.zeros(3), numpy.ones(3)),
        (Image.new("RGB", (8, 4)), Image.new("RGB", (4, 8))),
        (Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")),
    ):
        assert plain_description(one) == plain_description(copy.copy(one)) != plain_description(other)
    assert plain_description(numpy.int64(3)) == 3
    arrays = [numpy.zeros((2, 3)), numpy.zeros((3, 2)), numpy.zeros((2, 3), numpy.int64), torch.zeros(2, 3)]
    assert len({str(plain_description(array)) for array in arrays}) == 4


def test_a_difference_is_short_and_without_control_characters():
    (found,) = settings_diff({"a": "\x1b[2J" + "x" * 5000}, {"a": "y"})
    assert found.isprintable() and len(found) < 300


def test_a_scheduler_that_was_changed_is_told(tmp_path):
    pipe = tiny_pipeline("sd")
    result = optimize_noise(pipe, "a", ReNO(rewards="red", steps=1), **ARGUMENTS)
    result.save(tmp_path / "x")
    found = NoiseResult.load(tmp_path / "x")
    assert found.differences(pipe) == []
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    (told,) = found.differences(pipe)
    assert "scheduler timestep_spacing was" in told and "is 'leading'" in told


def test_scores_are_raw_and_a_reward_of_weight_zero_is_reported_only():
    result = optimize_noise(tiny_pipeline("sd"), "a", ReNO(rewards={"red": 2.0, "green": 0.0}, steps=3), **ARGUMENTS)
    torch.testing.assert_close(result.losses, -2 * result.scores["red"])
    assert result.scores["green"].shape == result.losses.shape == (3, 1)
    assert result.best_scores["red"] == result.scores["red"].max()


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    save_file({"noise": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="NoiseResult.save"):
        NoiseResult.load(tmp_path / "other.safetensors")


class Breaks:
    """Reward that is NaN, or whose gradient is, from its third call on."""

    def __init__(self, how: str):
        self.how, self.calls = how, 0
        self.__name__ = "breaks"

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls > 3:  # the first call is by `try_out`
            factor = images.mean() * torch.nan if self.how == "reward" else (images.flatten()[0] * 0).sqrt()
            return redness(images, prompts) + factor
        return redness(images, prompts)


@pytest.mark.parametrize("how", ["reward", "gradient"])
def test_numbers_that_are_none_stop_the_run_and_keep_the_best(how):
    method = ReNO(rewards=Breaks(how), steps=6, views=0)
    with pytest.warns(UserWarning, match="best"):
        result = optimize_noise(tiny_pipeline("sd"), "a", method, generator=generator(), **ARGUMENTS)
    assert result.provenance["stopped"] == f"non-finite {how}"
    assert result.noise.isfinite().all() and result.best_loss.item() == result.losses.min().item()
    assert len(result.losses) == (2 if how == "reward" else 3)


def test_a_reward_that_is_not_a_number_from_the_start_is_an_error():
    def broken(images, prompts):
        return images.mean((1, 2, 3)) * torch.nan

    with pytest.raises(ValueError, match="broken"):
        optimize_noise(tiny_pipeline("sd"), "a", ReNO(rewards=broken), **ARGUMENTS)


def test_rewards_given_by_name_are_loaded_once_per_pipeline(tmp_path, monkeypatch):
    from transformers import CLIPModel

    folder, loads = save_tiny_clip(tmp_path), []
    load = CLIPModel.from_pretrained.__func__
    monkeypatch.setattr(
        CLIPModel, "from_pretrained", classmethod(lambda cls, *a, **k: loads.append(a) or load(cls, *a, **k))
    )
    pipe = ReNOStableDiffusionPipeline(**tiny_pipeline("sd").components)
    pipe.set_progress_bar_config(disable=True)
    for weight in (1.0, 2.0):
        output = pipe("a", rewards={folder: weight, "red": 1.0}, steps=2, **ARGUMENTS)
        assert list(output.noise_result.scores) == ["clipscore", "red"]
    assert len(loads) == 1


def test_settings_without_rewards_and_rewards_beside_a_method_are_refused():
    pipe = ReNOStableDiffusionPipeline(**tiny_pipeline("sd").components)
    with pytest.raises(ValueError, match="nothing to optimize"):
        pipe("a", steps=3, **ARGUMENTS)
    with pytest.raises(ValueError, match="both"):
        pipe("a", rewards="red", method=ReNO(rewards="red"), **ARGUMENTS)
    with pytest.raises(ValueError, match="once"):
        pipe("a", rewards="red", steps=3, method_kwargs={"steps": 4}, **ARGUMENTS)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=2, target_modules=["0"]),
        LoraConfig(r=4, lora_alpha=2, target_modules=["0"], use_rslora=True),
        LoraConfig(r=4, lora_alpha=2, target_modules=["0"], use_dora=True),
        LoHaConfig(r=4, alpha=2, target_modules=["0"]),
        LoKrConfig(r=4, alpha=2, target_modules=["0"]),
        OFTConfig(r=4, oft_block_size=0, target_modules=["0"]),
        IA3Config(target_modules=["0"], feedforward_modules=[]),
    ],
    ids=["LoRA", "rsLoRA", "DoRA", "LoHa", "LoKr", "OFT", "IA3"],
)
def test_adapters_of_each_kind_are_described(config):
    """Their weight is 1 as they are added; another seed is another adapter."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(16, 16)), "mine")
        for name, parameter in module.named_parameters():
            if "mine" in name:
                torch.nn.init.normal_(parameter)
        found.append(describe_adapters(module))
    assert [each["mine"]["weight"] for each in found] == [1.0, 1.0]
    assert found[0]["mine"]["sha256"] != found[1]["mine"]["sha256"]
