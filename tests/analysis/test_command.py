"""`noiseopt analyze`, from saved results to table, numbers and figures, and its errors."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from noiseopt import CNO, NoiseResult, ReNO, optimize_noise, shapes_world
from noiseopt.cli import main
from noiseopt.demo import load_pipeline

PROMPTS = ["a red circle left of a blue star", "two green circles"]
FILES = {"table.md", "analysis.json", "coherence.png", "bands.png", "spectrum.png"}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with results of two methods on the embedded one-step model."""
    folder, pipe = tmp_path_factory.mktemp("results"), load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = dict(shapes_world.MODELS["turbo"].call)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    reno = ReNO(rewards="red", steps=4)
    optimize_noise(pipe, PROMPTS, reno, generator=generators, **call).save(folder / "reno.safetensors")
    call["num_images_per_prompt"] = 3
    for seed, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        optimize_noise(pipe, prompt, CNO(), generator=generator, **call).save(folder / "cno" / f"{seed}.safetensors")
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")  # a folder may hold other files
    part = folder / "cno" / f".noiseopt-{16 * '0'}.part.safetensors"  # of a process that was killed while it wrote
    shutil.copy(folder / "cno" / "0.safetensors", part)
    return folder


@pytest.fixture(scope="module")
def analyzed(results, tmp_path_factory) -> tuple[Path, str]:
    """The output folder and the printed text."""
    folder, printed = tmp_path_factory.mktemp("output") / "new", io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["analyze", str(results), "--draw", "--output", str(folder)])
    return folder, printed.getvalue()


def test_table_is_printed_and_everything_written(analyzed):
    folder, printed = analyzed
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "table.md").read_text() in printed
    assert "| CNO on turbo, 4×32×32 | ReNO on turbo, 4×32×32 |" in printed
    assert all(f"wrote {folder / name}" in printed for name in FILES)


def test_numbers_are_those_of_the_files(analyzed, results):
    cno, reno = json.loads((analyzed[0] / "analysis.json").read_text())
    result = NoiseResult.load(results / "reno.safetensors")
    assert result.initial_noise is not None
    change = (result.noise - result.initial_noise).flatten(1).double()
    assert (cno["noises"], reno["noises"]) == (6, 2) and len(cno["files"]) == 2
    assert reno["l2"]["initial noise, optimized noise"] == pytest.approx(float(change.norm(dim=1).mean()))
    assert reno["relative change"] == pytest.approx(float(change.norm() / result.initial_noise.norm()), rel=1e-5)
    assert sum(reno["band shares"]) == pytest.approx(1) and len(reno["band changes"]) == 4
    assert len(cno["band changes"]) == 4  # three steps, each followed by a move


def test_images_are_drawn_by_the_model_that_a_result_names(analyzed, results):
    reno = json.loads((analyzed[0] / "analysis.json").read_text())[1]
    result, pipe = NoiseResult.load(results / "reno.safetensors"), load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {**shapes_world.MODELS["turbo"].call, "output_type": "latent"}
    pairs = {"initial noise, its image": result.initial_noise, "optimized noise, its image": result.noise}
    for row, noise in pairs.items():
        latents = pipe(PROMPTS, latents=noise, **call).images
        assert reno["l2"][row] == pytest.approx(float((noise - latents).flatten(1).norm(dim=1).mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["coherence.png", "bands.png", "spectrum.png"])
def test_figures_have_panels(analyzed, name):
    with Image.open(analyzed[0] / name) as picture:
        assert picture.width > picture.height > 500
        assert len(set(picture.convert("RGB").resize((128, 64)).get_flattened_data())) > 50


def refused(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as error:
        main(["analyze", *arguments])
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def test_what_is_no_result_is_refused(results, tmp_path):
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "units").mkdir()
    assert "does not exist" in refused([str(tmp_path / "missing"), *output])
    assert "NoiseResult.save" in refused([str(results / "model.safetensors"), *output])
    assert "is not a complete safetensors file" in refused([str(tmp_path / "text.safetensors"), *output])
    assert "holds none" in refused([str(tmp_path), *output])
    (tmp_path / "settings.json").write_text("{}")
    assert "folder of an evaluation" in refused([str(tmp_path), *output])
    assert not (tmp_path / "out").exists()


def changed(results: Path, path: Path, **changes) -> str:
    result = NoiseResult.load(results / "reno.safetensors")
    vars(result).update(changes)
    result.save(path)
    return str(path)


def test_old_unchanged_and_too_little_are_refused(results, tmp_path):
    output = ["--output", str(tmp_path / "out")]
    old = changed(results, tmp_path / "old.safetensors", initial_noise=None)
    assert "did not store it" in refused([old, *output])
    noise = NoiseResult.load(results / "reno.safetensors").initial_noise
    same = changed(results, tmp_path / "same.safetensors", noise=noise)
    assert "Expected a noise that changed" in refused([same, *output])
    assert "fewer rings" in refused([str(results / "reno.safetensors"), "--rings", "40", *output])
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_had_is_said(results, tmp_path):
    provenance = NoiseResult.load(results / "reno.safetensors").provenance
    output = ["--draw", "--output", str(tmp_path / "out")]
    for model, why in ((str(tmp_path / "gone"), "Cannot sample the images of"), (None, "names its model")):
        lost = changed(results, tmp_path / "lost.safetensors", provenance={**provenance, "model": model})
        assert why in refused([lost, *output])
