"""Results on disk, and runs with non-finite numbers."""

import base64
import io
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from problems import generator, redness
from safetensors.torch import save_file
from tiny_pipelines import SIZE, call_arguments, save_tiny_clip, tiny_pipeline

from noiseopt import NoiseResult, ReNO, ReNOStableDiffusionPipeline, optimize_noise

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
    assert found["method"] == "ReNO" and found["settings"]["learning_rate"] == 5.0
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
    assert NoiseResult.load(tmp_path / "result.safetensors").provenance["model"] == str(tmp_path / "model")


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
