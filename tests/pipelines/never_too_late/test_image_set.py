"""Sets grown one image at a time: what the gradient sees, what is encoded, what is on disk, and that they differ."""

import functools
import json
import math
import pickle
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiers import slow_except
from tiny_pipelines import SIZE, call_arguments, flux_pipeline, quiet, sd_pipeline, sdxl_pipeline, tiny_pipeline

from noiseopt import (
    CNO,
    BestOfN,
    ImageSet,
    NeverTooLate,
    NeverTooLateFluxPipeline,
    NeverTooLateStableDiffusionPipeline,
    NeverTooLateTurboPipeline,
    NoiseResult,
    grow_set,
    optimize_noise,
    release_rewards,
    shapes_world,
)
from noiseopt.demo import ONE_STEP, load_pipeline, seeded
from noiseopt.pipelines import QualityGuard
from noiseopt.pipelines.loading import loaded_models
from noiseopt.pipelines.never_too_late import image_set_folder
from noiseopt.pipelines.never_too_late.image_set import pixels_of, sequential_method
from noiseopt.pipelines.result_folder import only_writer
from noiseopt.pipelines.results import result_file
from noiseopt.rewards import DPP, AutoReward, CLIPFeatures, DINOv2Features, Features, SetRewardSum

FAMILIES = ["sd", "sdxl", "sd3", "flux"]
ONE = {"num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}


def redness(images, prompts):
    return (images[:, 0] - images[:, 1]).mean((1, 2))


def method(**changes) -> NeverTooLate:
    return NeverTooLate(**{"diversity": {"dpp": ("tiny_image", 15.0)}, "steps": 3, "learning_rate": 50.0, **changes})


def grown(count: int = 3, found=None, **changes) -> ImageSet:
    return grow_set(tiny_pipeline("sd"), "a b", count, found or method(), **{"generator": 3, **ONE, **changes})


@functools.cache
def uninterrupted(count: int) -> ImageSet:
    """The set of the defaults; looked at only."""
    return grown(count)


def same(left: ImageSet, right: ImageSet) -> bool:
    """Bit for bit, in all that is kept but times."""
    pairs = list(zip(left.results, right.results, strict=True))
    tensors = [torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in ("noise", "losses")]
    plain_values = [getattr(left, name) == getattr(right, name) for name in ("values", "seeds", "settings", "prompt")]
    return torch.equal(left.images, right.images) and all(tensors + plain_values)


def dpp_of(row: dict[str, float | None]) -> tuple[float, float]:
    """The value of a set with an image, and with the plain one in its place."""
    optimized, plain = row["dpp"], row["baseline dpp"]
    assert optimized is not None and plain is not None
    return optimized, plain


def naive_dpp(images: torch.Tensor) -> float:
    """`logdet(I + K) / (N ln 2)` of the pictures shrunk to 32 × 32, in float64; those of 32 × 32 are so already."""
    vectors = images.double().flatten(1)
    kernel = torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in vectors]) for a in vectors])
    eigenvalues = torch.linalg.eigvalsh(kernel) + 1 + 1e-6
    return float(eigenvalues.log().sum()) / (len(images) * math.log(2))


class CountedFeatures(Features):
    """The pixels; remembers how many images it was given, and whether they carried a gradient."""

    name = "counted"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, bool]] = []

    def encode(self, images):
        self.calls.append((len(images), images.requires_grad))
        return images.flatten(1)


def test_the_value_is_that_of_the_union_divided_by_its_size():
    found = uninterrupted(4)
    assert found.values[0] == {"dpp": None, "baseline dpp": None}
    for count in (2, 3, 4):
        assert found.values[count - 1]["dpp"] == pytest.approx(naive_dpp(found.images[:count]), abs=1e-6)


def test_the_plain_value_is_that_of_the_plain_image_of_the_seed():
    found, pipe = uninterrupted(3), tiny_pipeline("sd")
    plain = pipe("a b", generator=torch.Generator().manual_seed(5), output_type="pt", **ONE).images
    assert found.values[2]["baseline dpp"] == pytest.approx(naive_dpp(torch.cat([found.images[:2], plain])), abs=1e-5)
    optimized, plain = dpp_of(found.values[2])
    assert optimized > plain


def test_the_first_image_is_the_plain_one():
    found, pipe = grown(1), tiny_pipeline("sd")
    (plain,) = pipe("a b", generator=torch.Generator().manual_seed(3), **ONE).images
    assert plain.tobytes() == found.pictures[0].tobytes()
    result = found.results[0]
    assert result.provenance["method"] == "PlainSampling"
    assert result.losses.tolist() == [[0.0]] and result.scores == {}
    assert found.seeds == [3] and len(found) == 1


def test_an_image_is_encoded_once_for_each_of_its_steps_and_once_as_a_reference():
    features = CountedFeatures()
    grown(4, method(diversity={DPP(features): 15.0}))
    own = [(1, True), (1, True), (1, False)]  # the last of three evaluations moves nothing
    assert features.calls == [(1, False), *3 * [*own, (1, False)]]


def test_the_gradient_is_that_of_the_union_with_respect_to_its_last_image():
    """One step of plain gradient descent, against the naive objective differentiated by finite differences."""
    pipe = tiny_pipeline("sd")
    rate = 0.1 * 64 / 16  # in units of the side of the noise
    plain = method(steps=2, learning_rate=rate, momentum=0.0, max_grad_norm=1e9, regularization=0.0, mode="parity")
    found = grown(3, plain)
    start = optimize_noise(
        pipe, "a b", BestOfN(rewards=redness, steps=1), generator=torch.Generator().manual_seed(5), **ONE
    )
    others = found.images[:2].double()

    def value(noise: torch.Tensor) -> float:
        images = pipe("a b", latents=noise, output_type="pt", **ONE).images
        return naive_dpp(torch.cat([others, images.double()]))

    moved = (found.results[2].noise - start.noise).double()
    assert moved.abs().max() > 0, "the step was the better one, so it is what is returned"
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(start.noise.shape, generator=generator)
        across = (value(start.noise + 0.02 * direction) - value(start.noise - 0.02 * direction)) / 0.04
        predicted = float((moved * direction).sum()) / 0.1 / 15.0
        assert predicted == pytest.approx(across, rel=0.08, abs=2e-6)


def test_only_the_last_noise_moves():
    """Those before it are what they were in the smaller set, bit for bit."""
    small, large = grown(2), uninterrupted(4)
    assert [torch.equal(a.noise, b.noise) for a, b in zip(small.results, large.results, strict=False)] == [True, True]
    assert torch.equal(small.images, large.images[:2])


def test_what_is_kept_of_a_result_has_no_graph_and_no_images():
    for result in uninterrupted(3).results:
        assert result.images is None and result.initial_images is None
        assert not result.noise.requires_grad and result.noise.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_grows_a_set_that_differs_more_than_plain_images(family):
    pipe, call = tiny_pipeline(family), call_arguments(family)
    found = grow_set(pipe, "a b", 3, method(steps=4), generator=3, **call)
    assert all(optimized > plain for optimized, plain in map(dpp_of, found.values[1:]))
    result = found.results[2]
    again = pipe(prompt="a b", latents=result.latents, generator=result.generator(), **call).images[0]
    assert again.tobytes() == found.pictures[2].tobytes()


def test_the_pipeline_stays_as_it_was():
    pipe = tiny_pipeline("sd")
    grown(1)  # a stock call leaves its own settings on the pipeline
    before = dict(vars(pipe))
    grown(2)
    assert type(pipe).__name__ == "StableDiffusionPipeline" and vars(pipe).keys() == before.keys()
    assert all(part.requires_grad for part in pipe.unet.parameters())


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_images_are_drawn_with_the_steps_of_render_and_these_join(family):
    pipe, call = tiny_pipeline(family), call_arguments(family)
    found = grow_set(
        pipe, "a b", 3, method(), generator=3, render={"num_inference_steps": 4}, **{**call, "num_inference_steps": 1}
    )
    assert found.results[2].provenance["arguments"]["num_inference_steps"] == 1
    for result, picture in zip(found.results, found.pictures, strict=True):
        four = {**call, "num_inference_steps": 4}
        again = pipe(prompt="a b", latents=result.latents, generator=result.generator(), **four).images[0]
        assert again.tobytes() == picture.tobytes()
    assert found.values[2]["dpp"] == pytest.approx(naive_dpp(found.images), abs=1e-6)


def test_each_image_stops_by_itself():
    (_, second, _) = grown(3, method(steps=8)).values
    found = grown(3, method(steps=8, stop_at=sum(dpp_of(second)) / 2))
    counts = [len(result.losses) for result in found.results]
    stopped = [result.provenance["stopped"] for result in found.results]
    assert counts[0] == 1 and 1 < counts[1] < 8 and stopped[1] == "diversity reached"
    assert counts[2] == 8 and stopped[2] is None, "three of these images never differ as much as two"


def test_callbacks_watch_each_image_but_the_plain_one():
    steps: list[int] = []
    grown(3, callbacks=lambda state: steps.append(state.step))
    assert steps == [0, 1, 2, 0, 1, 2]


def test_references_of_the_method_belong_to_the_set():
    given = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = grown(2, method(references=given))
    for count in (1, 2):
        union = torch.cat([given, found.images[:count]])
        assert found.values[count - 1]["dpp"] == pytest.approx(naive_dpp(union), abs=1e-6)
    assert len(found.results[0].losses) == 3, "there was something for the first image to differ from"
    known = SetRewardSum({"dpp": ("tiny_image", 15.0)}).known_features(given)
    assert torch.equal(grown(2, method(references=known)).images, found.images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": redness},
        {"hinge": {"dpp": 0.9}},
        {"guard": {"sharpness": {"keep": 0.9}}},
        {"guard": [QualityGuard(reward=redness, drop=0.5)], "rewards": redness},
        {"diversity": [("dpp", "tiny_image", 15.0), ("pairwise", "tiny_image", 5.0), ("dpp", "color_histogram", 1.0)]},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_what_never_too_late_can_do_it_can_do_here(changes, tmp_path):
    whole = grown(3, method(**changes))
    names = ["dpp", "pairwise", "dpp_2"] if "diversity" in changes else ["dpp"]
    assert list(whole.values[2]) == [*names, *(f"baseline {name}" for name in names)]
    grown(2, method(**changes), folder=tmp_path)
    assert same(grown(3, method(**changes), folder=tmp_path), whole)


@pytest.mark.parametrize("family", slow_except(["sd", "sdxl"], "sd"))
def test_a_set_that_is_resumed_is_one_that_was_never_interrupted(family, tmp_path):
    pipe, call = tiny_pipeline(family), {**call_arguments(family), "noise_sampler": "pink"}
    whole = grow_set(pipe, "a b", 4, method(), generator=3, **call)
    for count in (1, 3, 4):
        found = grow_set(pipe, "a b", count, method(), generator=3, folder=tmp_path / "set", **call)
        assert len(found) == count
    assert same(found, whole) and same(ImageSet.load(tmp_path / "set"), whole)


def test_without_seeds_a_set_goes_on_by_one(tmp_path):
    grown(2, folder=tmp_path, generator=7)
    assert same(grown(3, folder=tmp_path, generator=None), grown(3, generator=7))
    torch.manual_seed(1)
    first = grown(2, generator=None)
    torch.manual_seed(1)
    assert grown(2, generator=None).seeds == first.seeds and first.seeds[1] == first.seeds[0] + 1


def test_seeds_by_image_and_by_generator():
    assert grown(2, generator=[3, 9]).seeds == [3, 9]
    assert same(grown(2, generator=torch.Generator().manual_seed(3)), grown(2))
    assert same(grown(2, generator=[3, 4]), grown(2))


def test_a_set_that_is_large_enough_is_returned_as_it_is(tmp_path):
    whole = grown(3, folder=tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert same(grown(3, folder=tmp_path), whole) and same(grown(1, folder=tmp_path), whole)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


class Crash(Exception):
    pass


def test_a_crash_while_an_image_is_optimized_loses_that_image_only(tmp_path):
    steps: list[int] = []

    def crash(state):
        steps.append(state.step)
        if len(steps) == 5:  # the second step of the third image
            raise Crash

    with pytest.raises(Crash) as caught:
        grown(4, folder=tmp_path, callbacks=crash)
    partial = caught.value.image_set
    assert len(partial) == 2 and same(ImageSet.load(tmp_path), partial)
    assert same(grown(4, folder=tmp_path), uninterrupted(4))


@pytest.mark.parametrize("moment", [0, 1, 2, 3, 5, 6])
def test_a_crash_while_files_are_written_leaves_a_valid_set(moment, tmp_path, monkeypatch):
    """The record of no image, then of each image a picture, a noise and a record: whichever of them is interrupted."""
    writes: list[str] = []
    atomic_write = image_set_folder.atomic_write

    def crash(path, write):
        if len(writes) == moment:
            path.with_name(f".part-{path.name}").write_bytes(b"half")
            raise Crash
        writes.append(path.name)
        atomic_write(path, write)

    for module in (image_set_folder, result_file):
        monkeypatch.setattr(module, "atomic_write", crash)
    with pytest.raises(Crash):
        grown(3, folder=tmp_path)
    monkeypatch.undo()
    if moment:
        assert len(ImageSet.load(tmp_path)) == (moment - 1) // 3
    assert same(grown(3, folder=tmp_path), uninterrupted(3))


def test_a_folder_that_another_process_is_writing_to_is_refused(tmp_path):
    whole = uninterrupted(3)
    with only_writer(tmp_path / "set"):
        for write in (lambda: grown(3, folder=tmp_path / "set"), lambda: whole.save(tmp_path / "set")):
            with pytest.raises(ValueError, match="another process is writing to .*set"):
                write()
    assert same(grown(3, folder=tmp_path / "set"), whole)


def test_save_and_load(tmp_path):
    whole = uninterrupted(3)
    whole.save(tmp_path / "set")
    assert same(ImageSet.load(tmp_path / "set"), whole)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        *(f"image_00{index}{suffix}" for index in range(3) for suffix in (".png", ".safetensors")),
        "image_set.json",
    ]
    with Image.open(tmp_path / "set/image_002.png") as picture:
        assert torch.equal(pixels_of(picture), whole.images[2:])
    assert NoiseResult.load(tmp_path / "set/image_002.safetensors").provenance["seeds"] == [5]
    assert same(grown(4, folder=tmp_path / "set"), uninterrupted(4))
    with pytest.raises(ValueError, match="without images of another set"):
        whole.save(tmp_path / "set")


DISAGREEMENTS = [
    ({"prompt": "b"}, "prompt was 'a b' and is 'b'"),
    ({"guidance_scale": 3.0}, "arguments guidance_scale was 0.0 and is 3.0"),
    ({"negative_prompt": "b"}, "arguments negative_prompt was None and is 'b'"),
    ({"found": {"learning_rate": 5.0}}, "method learning_rate was 50.0 and is 5.0"),
    ({"found": {"diversity": {"dpp": ("tiny_image", 1.0)}}}, "method diversity dpp weight was 15.0 and is 1.0"),
    (
        {"found": {"diversity": {"dpp": ("color_histogram", 15.0)}}},
        "features was 'tiny_image' and is 'color_histogram'",
    ),
    ({"found": {"rewards": redness}}, "method rewards was None and is {'redness': 1.0}"),
    ({"found": {"stop_at": {"dpp": 0.9}}}, "method stop_at was None"),
    ({"render": {"num_inference_steps": 4}}, "render num_inference_steps was None and is 4"),
    ({"noise_sampler": "pink"}, "noise_sampler was None"),
    ({"generator": 4}, "seeds that the set was grown with, .3, 4., but got .4, 5."),
    ({"generator": [3, 5, 6]}, "seeds that the set was grown with, .3, 4., but got .3, 5."),
    ({"pipe": "sdxl"}, "scheduler class was 'EulerDiscreteScheduler'"),
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    grown(2, folder=folder)
    return folder


@pytest.mark.parametrize(("changes", "message"), DISAGREEMENTS, ids=lambda value: str(value)[:40])
def test_a_folder_of_another_set_is_refused_by_what_differs(changes, message, begun):
    changes = {"prompt": "a b", "pipe": "sd", "generator": 3, **ONE, **changes}
    found, pipe = method(**changes.pop("found", {})), tiny_pipeline(changes.pop("pipe"))
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    with pytest.raises(ValueError, match=message):
        grow_set(pipe, changes.pop("prompt"), 3, found, folder=begun, **changes)
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == before


def test_pictures_that_were_changed_are_noticed_by_their_values(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "set")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "set/image_001.png")
    with pytest.raises(ValueError, match="Expected 'dpp' to be .* at image 1 of the set, as saved"):
        grown(3, folder=tmp_path / "set")


def rewrite(folder, **changes):
    file = folder / "image_set.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


BROKEN = {
    "no json": lambda folder: (folder / "image_set.json").unlink(),
    "half a json": lambda folder: (folder / "image_set.json").write_text('{"format": "noiseopt'),
    "deep json": lambda folder: (folder / "image_set.json").write_text("[" * 200_000),
    "binary json": lambda folder: (folder / "image_set.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda folder: (folder / "image_set.json").write_text("[]"),
    "other format": lambda folder: rewrite(folder, format="noiseopt-result-1"),
    "unknown entries": lambda folder: rewrite(folder, code="import os"),
    "seeds missing": lambda folder: rewrite(folder, seeds=None),
    "more seeds than values": lambda folder: rewrite(folder, seeds=[3, 4, 5]),
    "seeds of text": lambda folder: rewrite(folder, seeds=["../../x", "y"]),
    "values of text": lambda folder: rewrite(folder, values=[{"dpp": "x"}, {}]),
    "swapped seeds": lambda folder: rewrite(folder, seeds=[4, 3]),
    "more images than files": lambda folder: rewrite(folder, seeds=[3, 4, 5], values=[{}, {}, {}]),
    "no png": lambda folder: (folder / "image_001.png").unlink(),
    "half a png": lambda folder: (folder / "image_001.png").write_bytes((folder / "image_001.png").read_bytes()[:80]),
    "no png inside": lambda folder: Image.new("RGB", (32, 32)).save(folder / "image_001.png", format="BMP"),
    "grey png": lambda folder: Image.new("L", (32, 32)).save(folder / "image_001.png"),
    "another size": lambda folder: Image.new("RGB", (64, 32)).save(folder / "image_001.png"),
    "no noise": lambda folder: (folder / "image_001.safetensors").unlink(),
    "a pickle": lambda folder: (folder / "image_001.safetensors").write_bytes(pickle.dumps(Planted())),
    "a torch file": lambda folder: torch.save(Planted(), folder / "image_001.safetensors"),
    "foreign tensors": lambda folder: save_file({"a": torch.zeros(1)}, folder / "image_001.safetensors"),
    "hostile header": lambda folder: save_file(
        {"noise": torch.zeros(1)},
        folder / "image_001.safetensors",
        metadata={"noiseopt": '{"format": "noiseopt-result-1", "provenance": [], "generator_devices": []}'},
    ),
}


@pytest.mark.parametrize("breaking", BROKEN)
def test_a_broken_or_hostile_folder_is_refused(breaking, begun, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(begun, folder)
    BROKEN[breaking](folder)
    with pytest.raises(ValueError, match="Expected a folder"):
        ImageSet.load(folder)
    with pytest.raises(ValueError, match="Expected a folder"):
        grown(3, folder=folder)


def test_other_files_of_a_folder_are_left_alone_and_a_file_is_no_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    grown(1, folder=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(ImageSet.load(tmp_path)) == 1
    with pytest.raises(ValueError, match="notes.txt is a file"):
        grown(1, folder=tmp_path / "notes.txt")


class NoModelRuns:
    """Fails where a denoiser of the tiny pipeline runs."""

    def __enter__(self):
        self.handle = tiny_pipeline("sd").unet.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))

    def __exit__(self, *_):
        self.handle.remove()


BAD = [
    ({"count": 0}, ValueError, "`count` to be an integer of 1 or more, but got 0"),
    ({"count": 2.0}, ValueError, "`count` to be an integer"),
    ({"prompt": ["a", "b"]}, ValueError, "Expected one prompt for the set"),
    ({"method": CNO()}, TypeError, "such as `NeverTooLate`.*but CNO has none"),
    ({"method": BestOfN(rewards=redness)}, TypeError, "but BestOfN has none"),
    ({"method": "nothing"}, ValueError, "a method out of .* but got 'nothing'"),
    ({"method": method(diversity="nothing")}, ValueError, "nothing"),
    ({"method": method(stop_at={"vendi": 2.0})}, ValueError, "`stop_at` of set rewards out of"),
    ({"method": method(learning_rate=-1.0)}, ValueError, "`learning_rate` to be a number in"),
    ({"num_images_per_prompt": 2}, ValueError, "without .'num_images_per_prompt'."),
    ({"latents": torch.zeros(1, 4, 16, 16)}, ValueError, "without .'latents'."),
    ({"output_type": "pt"}, ValueError, "without .'output_type'."),
    ({"render": {"height": 64}}, ValueError, "`render` without .'height'."),
    ({"noise_sampler": "coupled"}, ValueError, "draws one image at a time, but got 'coupled'"),
    ({"noise_sampler": "purple"}, ValueError, "noise sampler"),
    ({"generator": [1, 2]}, ValueError, "3 different seeds"),
    ({"generator": [1, 2, 1]}, ValueError, "3 different seeds"),
    ({"generator": -1}, ValueError, "a seed of 0 or more"),
    ({"generator": True}, ValueError, "a seed of 0 or more"),
    ({"generator": "3"}, ValueError, "a seed of 0 or more"),
    ({"generator": [torch.Generator()] * 3}, ValueError, "a seed of 0 or more"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_refused_before_any_model_runs(changes, error, message, tmp_path):
    changes = {"prompt": "a b", "count": 3, "method": method(), **ONE, **changes}
    with NoModelRuns(), pytest.raises(error, match=message):
        grow_set(tiny_pipeline("sd"), folder=tmp_path / "set", **changes)
    with pytest.raises(ValueError):
        ImageSet.load(tmp_path / "set")


def test_arguments_that_the_pipeline_does_not_take_are_refused():
    call = call_arguments("flux")
    with pytest.raises(TypeError, match="inference_steps"):
        grow_set(tiny_pipeline("flux"), "a b", 2, method(), inference_steps=4, **call)
    with pytest.raises(TypeError, match="inference_steps"):
        grow_set(tiny_pipeline("flux"), "a b", 2, method(), render={"inference_steps": 4}, **call)


def test_the_default_is_the_published_setting_of_this_mode():
    default = sequential_method(None, None)
    assert (default.diversity, default.stop_at, default.rewards) == ({"dpp": 15.0}, {"dpp": 0.98}, None)
    assert (default.steps, default.learning_rate, default.max_grad_norm) == (25, 3.0, 0.15)
    other = sequential_method(None, {"diversity": "vendi", "steps": 9})
    assert (other.diversity, other.stop_at, other.steps, other.learning_rate) == ("vendi", None, 9, 3.0)


PIPELINES = {
    NeverTooLateStableDiffusionPipeline: (sd_pipeline, "sd"),
    NeverTooLateTurboPipeline: (sdxl_pipeline, "sdxl"),
    NeverTooLateFluxPipeline: (flux_pipeline, "flux"),
}


@pytest.mark.slow
@pytest.mark.parametrize("cls", PIPELINES, ids=lambda cls: cls.__name__)
def test_a_pipeline_grows_the_same_set_from_plain_values(cls, tmp_path):
    build, family = PIPELINES[cls]
    pipe, call = quiet(cls(**quiet(build()).components)), call_arguments(family)
    settings = {"diversity": {"dpp": ("tiny_image", 15.0)}, "steps": 3, "learning_rate": 50.0}
    output = pipe.grow_set("a b", 3, **settings, generator=3, folder=tmp_path, **call)
    found = method(max_grad_norm=0.15)
    expected = grow_set(tiny_pipeline(family), "a b", 3, found, generator=3, **call)
    assert [picture.tobytes() for picture in output.images] == [picture.tobytes() for picture in expected.pictures]
    assert torch.equal(output.image_set.images, expected.images) and output.image_set.values == expected.values
    assert len(ImageSet.load(tmp_path)) == 3


def test_a_pipeline_loads_what_has_a_name_once():
    pipe = quiet(NeverTooLateStableDiffusionPipeline(**sd_pipeline().components, requires_safety_checker=False))
    settings = {"diversity": {"dpp": ("tiny_image", 15.0)}, "rewards": "sharpness", "guard": {"complexity": 0.5}}
    pipe.grow_set("a b", 2, **settings, steps=2, **ONE)
    loaded = dict(loaded_models(pipe).models)
    pipe.grow_set("a b", 2, **settings, steps=2, **ONE)
    assert {name for _, name, *_ in loaded} == {"tiny_image", "sharpness", "complexity"}
    assert loaded_models(pipe).models == loaded


def test_rewards_of_weight_0_that_are_guarded_grow_a_set_as_they_optimize_one():
    guarded = {"rewards": {"brightness": 0.0}, "guard": {"brightness": {"keep": 0.8}}, "steps": 2}
    assert len(grown(2, method(**guarded))) == 2


def test_a_folder_that_is_no_path_is_refused(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    with pytest.raises(TypeError, match="Expected `folder` to be a path, but got 5"):
        grow_set(sd_pipeline(), "a b", 2, method(), folder=5, **ONE)


def test_names_are_loaded_once_for_all_images_of_a_set(monkeypatch):
    loads: list[str] = []
    load = AutoReward.from_pretrained
    release_rewards(tiny_pipeline("sd"))
    monkeypatch.setattr(AutoReward, "from_pretrained", lambda name, **rest: loads.append(name) or load(name, **rest))
    grown(4, method(rewards="sharpness", guard={"complexity": 0.5}, steps=2))
    assert sorted(loads) == ["complexity", "sharpness"]


@pytest.mark.slow
def test_sets_of_the_embedded_model_differ_more_than_plain_ones_and_in_more_than_what_is_optimized():
    """In the features that are optimized, in those of another network, and in the sizes that the judge sees."""
    pipe = load_pipeline("turbo")
    pipe.set_progress_bar_config(disable=True)
    optimized = DPP(DINOv2Features.from_pretrained(shapes_world.path("dinov2")))
    held_out = DPP(CLIPFeatures.from_pretrained(shapes_world.path("clip")))
    found = method(diversity={optimized: 15.0}, steps=12, learning_rate=3.0)
    gains = []
    for prompt in shapes_world.VALIDATION_PROMPTS[:2]:
        grown_images = grow_set(pipe, prompt, 6, found, generator=0, **ONE_STEP).images
        plain = pipe([prompt] * 6, generator=seeded(0, 6), output_type="pt", **ONE_STEP).images
        measures = (optimized, held_out, spread_of_sizes)
        gains.append([float(measure(grown_images)) - float(measure(plain)) for measure in measures])
    of_dpp, of_held_out, of_sizes = torch.tensor(gains).mean(0).tolist()
    assert all(gain[0] > 0.01 for gain in gains)
    assert of_dpp > 0.03 and of_held_out > 0.01 and of_sizes > 5


def spread_of_sizes(images: torch.Tensor) -> float:
    """The standard deviation of the area of the largest object, in pixels."""
    return float(torch.tensor([float(things[0].area) for things in shapes_world.see(images) if things]).std())
