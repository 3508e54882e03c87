"""Damaged, foreign and malicious result files: refused with one clear error, and never unpickled."""

import ast
import json
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from problems import redness
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_pipelines import SIZE, tiny_pipeline

from noiseopt import NoiseResult, ReNO, optimize_noise
from noiseopt.pipelines.results.result_file import RESULT_FORMAT

ROOT = Path(__file__).parents[3]
STEPS, BATCH = 3, 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Save the result of a run of three steps for two images with one generator each."""
    streams = [torch.Generator().manual_seed(seed) for seed in range(BATCH)]
    call = {"generator": streams, "num_inference_steps": 1, "guidance_scale": 0.0, **SIZE}
    result = optimize_noise(tiny_pipeline("sd"), ["a", "b"], ReNO(rewards=redness, steps=STEPS), **call)
    result.reports["held out"] = {"best": [0.5, 1.0]}
    result.save(tmp_path_factory.mktemp("saved") / "result.safetensors")
    return next(tmp_path_factory.getbasetemp().glob("saved*/result.safetensors"))


@pytest.fixture(autouse=True)
def nothing_is_unpickled(monkeypatch):
    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("it was unpickled"))


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["noiseopt"])  # noqa: SIM118


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def tensors(**changes):
    """Write a file with changed tensors: a function of the old one, or `None` to leave it out."""

    def write(path: Path, saved: Path) -> None:
        found, header = content(saved)
        for name, change in changes.items():
            name = name.replace("__", ".")
            if change is None:
                del found[name]
            else:
                found[name] = change(found.get(name)).contiguous()
        save_file(found, path, metadata={"noiseopt": json.dumps(header)})

    return write


def header(change, **metadata):
    """Write a file with the header `change(header)` and further metadata."""

    def write(path: Path, saved: Path) -> None:
        found, header = content(saved)
        changed = change(header)
        text = changed if isinstance(changed, str) else json.dumps(changed)
        save_file(found, path, metadata={"noiseopt": text, **metadata})

    return write


def of_bytes(change):
    return lambda path, saved: path.write_bytes(change(saved.read_bytes()))


def provenance(**changes):
    return header(lambda found: {**found, "provenance": {**found["provenance"], **changes}})


def declaring(length: int):
    """Write a file whose noise claims this length."""

    def write(path: Path, saved: Path) -> None:
        whole = saved.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        index = json.loads(whole[8:end])
        index["noise"] = {"dtype": "F32", "shape": [length], "data_offsets": [0, 4 * length]}
        path.write_bytes(framed(index) + whole[end:])

    return write


def framed(index) -> bytes:
    """Return a safetensors file of this header alone."""
    text = json.dumps(index).encode()
    return len(text).to_bytes(8, "little") + text


def other(tensor):
    return tensor[:1]


def nested(found: dict, levels: int) -> dict:
    value: list = []
    for _ in range(levels - 1):
        value = [value]
    return {**found, "reports": {"deep": value}}


NO_PART = "not a complete safetensors file"
FOREIGN = {
    "a folder": (lambda path, _: path.mkdir(), "is a folder"),
    "empty": (of_bytes(lambda _: b""), "is empty"),
    "zeros": (of_bytes(lambda _: bytes(1000)), NO_PART),
    "random bytes": (of_bytes(lambda _: random.Random(0).randbytes(5000)), NO_PART),
    "text": (of_bytes(lambda _: b"noise"), NO_PART),
    "half of it": (of_bytes(lambda found: found[: len(found) // 2]), NO_PART),
    "the header alone": (of_bytes(lambda found: found[: 8 + int.from_bytes(found[:8], "little")]), NO_PART),
    "all but a byte": (of_bytes(lambda found: found[:-1]), NO_PART),
    "more at the end": (of_bytes(lambda found: found + b"PK"), NO_PART),
    "a header that is huge": (of_bytes(lambda found: (2**62).to_bytes(8, "little") + found[8:]), NO_PART),
    "a header that is a list": (of_bytes(lambda _: (2).to_bytes(8, "little") + b"[]"), NO_PART),
    "metadata that are numbers": (of_bytes(lambda _: framed({"__metadata__": {"noiseopt": 1}})), NO_PART),
    "a header of many lists": (
        of_bytes(lambda _: framed([[]] * 3_000_000)),
        "a header of .* where a result has at most",
    ),
    "a tensor that is huge": (declaring(2**40), NO_PART),
    "a tensor that overflows": (declaring(2**62), NO_PART),
    "a pickle": (of_bytes(lambda _: pickle.dumps(Planted(), protocol=4)), "pickle"),
    "an old pickle": (of_bytes(lambda _: pickle.dumps(Planted(), protocol=2)), "pickle"),
    "a torch file": (lambda path, _: torch.save(Planted(), path), "torch.save"),
    "tensors of another": (lambda path, _: save_file({"noise": torch.zeros(1)}, path), f"no {RESULT_FORMAT} header"),
    "no JSON": (header(lambda _: "{" * 10), "not JSON"),
    "deep JSON": (header(lambda _: "[" * 200_000), "not JSON"),
    "a hundred levels": (header(lambda found: nested(found, 100)), "has a header of more than 100 levels"),
    "a number without end": (header(lambda _: "1" * 10_000), "not JSON"),
    "a list": (header(lambda _: [1]), f"no {RESULT_FORMAT} header"),
    "another format": (header(lambda found: {**found, "format": "noiseopt-image-set-1"}), f"no {RESULT_FORMAT}"),
    "a newer format": (header(lambda found: {**found, "format": "noiseopt-result-2"}), "newer noiseopt.*Update"),
    "format 10": (header(lambda found: {**found, "format": "noiseopt-result-10"}), "newer noiseopt.*Update"),
}
HEADERS = {
    "an unknown key": (header(lambda found: {**found, "code": "import os"}), "unknown metadata code"),
    "unknown metadata": (header(lambda found: found, pickled="gASV"), "unknown metadata pickled"),
    "no provenance": (header(lambda found: {k: v for k, v in found.items() if k != "provenance"}), "provenance"),
    "a provenance that is a list": (header(lambda found: {**found, "provenance": []}), "of the wrong type: provenance"),
    "reports that are text": (header(lambda found: {**found, "reports": "x"}), "of the wrong type: reports"),
    "devices that are text": (header(lambda found: {**found, "generator_devices": "cpu"}), "wrong type"),
    "a device less": (header(lambda found: {**found, "generator_devices": ["cpu"]}), "unknown tensors generator_st"),
    "a device more": (header(lambda found: {**found, "generator_devices": ["cpu"] * 3}), "lacks the tensors generator"),
    "a device of another kind": (
        header(lambda found: {**found, "generator_devices": ["cpu", "cuda"]}),
        "invalid on 'cuda'",
    ),
    "a device that is none": (
        header(lambda found: {**found, "generator_devices": ["cpu", "../x"]}),
        "invalid on '../x'",
    ),
    "a device that torch does not know": (
        header(lambda found: {**found, "generator_devices": ["cpu", "cpt"]}),
        "invalid on 'cpt'",
    ),
    "a device with another's state": (
        header(lambda found: {**found, "generator_devices": ["cpu", "ipu"]}),
        "invalid on 'ipu'",
    ),
    "a device that is a number": (header(lambda found: {**found, "generator_devices": ["cpu", 3]}), "invalid on 3"),
    "a device of many characters": (
        header(lambda found: {**found, "generator_devices": ["cpu", "x" * 10_000]}),
        "invalid on 'xxx.*…",
    ),
    "one stream for all": (provenance(generators="single"), "2 generator states, where 1"),
    "prompts of another batch": (provenance(prompts=["a"]), "provenance whose prompts"),
    "prompts that are numbers": (provenance(prompts=[1, 2]), "provenance whose prompts"),
    "prompts that are text": (provenance(prompts="ab"), "provenance whose prompts"),
    "seeds that are text": (provenance(seeds=["1", "2"]), "provenance whose seeds"),
    "too many seeds": (provenance(seeds=[1, 2, 3]), "provenance whose seeds"),
    "a model that is a list": (provenance(model=["x"]), "provenance whose model"),
    "a method that is a number": (provenance(method=3), "provenance whose method"),
    "a dtype that is a function": (provenance(dtype="load"), "provenance whose dtype"),
    "a dtype that is a number": (provenance(dtype=3), "provenance whose dtype"),
    "a method that is markup": (provenance(method="<script>alert(1)</script>"), "provenance whose method"),
    "a method that is an escape": (provenance(method="\x1b[2J"), "provenance whose method"),
    "a method of many characters": (provenance(method="a" * 1000), "provenance whose method"),
    "a pipeline that is a path": (provenance(pipeline="../../evil"), "provenance whose pipeline"),
    "a scheduler of another package": (provenance(scheduler={"class": "os.system"}), "provenance whose scheduler"),
    "a decoder that is text": (provenance(decoder="evil/decoder"), "provenance whose decoder"),
    "a decoder without a class": (provenance(decoder={"name": "evil/decoder"}), "provenance whose decoder"),
    "generators of another kind": (provenance(generators="many"), "provenance whose generators"),
    "a scheduler that is text": (provenance(scheduler="Euler"), "provenance whose scheduler"),
}
TENSORS = {
    **{f"no {name}": (tensors(**{name: None}), f"lacks the tensors {name}") for name in ("noise", "latents", "losses")},
    "no best step": (tensors(best_step=None), "lacks the tensors best_step"),
    "no state": (tensors(generator_states__1=None), "lacks the tensors generator_states.1"),
    "an unknown tensor": (tensors(weights=lambda _: torch.zeros(1)), "unknown tensors weights"),
    "half the noise": (tensors(noise=other), "is expected"),
    "half the latents": (tensors(latents=other), "latents of shape"),
    "latents that are flat": (tensors(latents=lambda old: old[:, 0, 0, 0]), "latents of shape"),
    "half the losses": (tensors(losses=lambda old: old[:, :1]), "'losses' of shape"),
    "losses of fewer steps": (tensors(losses=other), "is expected"),
    "flat losses": (tensors(losses=lambda old: old.flatten()), "is expected"),
    "a single loss": (tensors(losses=lambda old: old[0, 0]), "losses of shape"),
    "norms of fewer steps": (tensors(norms=other), "'norms' of shape"),
    "scores of fewer steps": (tensors(scores__redness=other), "'scores.redness' of shape"),
    "one best step": (tensors(best_step=other), "'best_step' of shape"),
    "bands of fewer steps": (tensors(band_changes=other), "'band_changes' of shape"),
    "four bands": (tensors(band_changes=lambda old: torch.cat([old, old], 2)[..., :4]), "'band_changes' of shape"),
    "an initial noise of another shape": (tensors(initial_noise=lambda old: old[:, :1]), "'initial_noise' of shape"),
    "no noise at all": (tensors(noise=lambda old: old[:0]), "noise of shape"),
    "noise without a size": (tensors(noise=lambda old: old[:, 0, 0, 0]), "noise of shape"),
    "no steps": (tensors(losses=lambda old: old[:0]), "losses of shape"),
    "noise of integers": (tensors(noise=lambda old: old.long()), "'noise' of torch.int64"),
    "half precision noise": (tensors(noise=lambda old: old.half()), "'noise' of torch.float16"),
    "complex latents": (tensors(latents=lambda old: old.cfloat()), "'latents' of torch.complex64"),
    "losses of truth": (tensors(losses=lambda old: old > 0), "'losses' of torch.bool"),
    "scores of integers": (tensors(scores__redness=lambda old: old.long()), "'scores.redness' of torch.int64"),
    "a best step in floats": (tensors(best_step=lambda old: old.float()), "'best_step' of torch.float32"),
    "NaN in the noise": (
        tensors(noise=lambda old: old.index_fill(3, torch.tensor([0]), torch.nan)),
        "'noise' with val",
    ),
    "infinite latents": (tensors(latents=lambda old: old / 0), "'latents' with values that are not finite"),
    "infinite initial noise": (tensors(initial_noise=lambda old: old / 0), "'initial_noise' with values"),
    "a best step after the last": (tensors(best_step=lambda old: old * 0 + STEPS), "best steps 3, 3 out of 3 steps"),
    "a best step before the first": (tensors(best_step=lambda old: old * 0 - 1), "best steps -1, -1"),
    "a short state": (tensors(generator_states__0=lambda old: old[:100]), "invalid on 'cpu'"),
    "an empty state": (tensors(generator_states__0=lambda old: old[:0]), "invalid on 'cpu'"),
    "a state of floats": (tensors(generator_states__0=lambda old: old.float()), "invalid on 'cpu'"),
    "a state of two rows": (tensors(generator_states__0=lambda old: old[None]), "invalid on 'cpu'"),
    "a state of noise": (tensors(generator_states__0=lambda old: old * 0 + 255), "invalid on 'cpu'"),
}
HOSTILE = {**FOREIGN, **HEADERS, **TENSORS}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name(case, saved, tmp_path):
    write, message = HOSTILE[case]
    path = tmp_path / "found.safetensors"
    write(path, saved)
    with pytest.raises(
        ValueError, match=f"(?s)^Expected a file that `NoiseResult.save` wrote.*found.*{message}"
    ) as error:
        NoiseResult.load(path)
    assert len(str(error.value)) < 700 + len(str(path))


def test_many_lists_are_refused_at_once(saved, tmp_path):
    """50 MB of `[],[],…` take 45 seconds to parse."""
    bomb = ('{"a": [' + "[]," * 16_000_000 + "[]]}").encode()
    (tmp_path / "bomb").write_bytes(len(bomb).to_bytes(8, "little") + bomb + bytes(64))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="a header of 48,000,011 bytes, where a result has at most 4,194,304"):
        NoiseResult.load(tmp_path / "bomb")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("hide", ["noise", "the name of a score", "the shape of a score", "metadata"])
def test_an_error_has_no_control_characters_and_is_short(hide, saved, tmp_path):
    found, path = content(saved), tmp_path / "x"
    evil = "\x1b]0;owned\x07\u202e" + "y" * 1000
    metadata = {"noiseopt": json.dumps(found[1])}
    extra = {
        "noise": {f"noise{evil}": torch.zeros(1)},
        "the name of a score": {f"scores.{evil}": torch.zeros(1)},
        "the shape of a score": {"scores.x": torch.zeros([1] * 900)},
        "metadata": {},
    }[hide]
    save_file({**found[0], **extra}, path, metadata=metadata | ({evil: "x"} if hide == "metadata" else {}))
    with pytest.raises(ValueError, match="NoiseResult.save") as error:
        NoiseResult.load(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 800


def test_the_name_of_a_score_is_shown_without_control_characters(saved, tmp_path):
    tensors(**{"scores__\x1b[31mred\n": lambda _: torch.zeros(STEPS, BATCH)})(tmp_path / "x", saved)
    assert r"\x1b[31mred\n 0" in repr(NoiseResult.load(tmp_path / "x"))


def test_a_result_made_by_hand_has_a_repr(saved):
    found = NoiseResult.load(saved)
    for decoder in ("text", {}, ["x"], None):
        found.provenance["decoder"] = decoder
        assert repr(found).startswith("NoiseResult(2×4×16×16, best of 3 steps")


def test_a_result_without_states_has_no_generator(saved):
    found = NoiseResult.load(saved)
    found.generator_states = []
    assert found.provenance["generators"] == "list" and found.generator() is None


def test_a_file_that_may_not_be_read_is_a_value_error(saved, tmp_path, monkeypatch):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(Path, "open", closed)  # root may read every file
    with pytest.raises(ValueError, match="Expected a file that can be read, but got .*Permission denied"):
        NoiseResult.load(saved)


def test_what_another_process_replaces_is_read_from_one_of_the_two(saved, tmp_path):
    """The steps of the provenance and the losses are those of one file."""
    path, sources = tmp_path / "shared", []
    for steps in (1, 2):
        found = NoiseResult.load(saved)
        found.provenance["steps"], found.losses, found.norms = steps, found.losses[:steps], found.norms[:steps]
        found.scores = {"a": found.losses}
        found.best_step, found.band_changes = found.best_step * 0, None
        found.save(tmp_path / f"{steps}")
        sources.append(str(tmp_path / f"{steps}"))
    shutil.copy(sources[0], path)
    swap = (
        "import itertools, os, sys\n"
        "for source in itertools.cycle(sys.argv[2:]):\n"
        "    os.link(source, sys.argv[1] + '.next')\n"
        "    os.replace(sys.argv[1] + '.next', sys.argv[1])\n"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", swap, str(path), *sources])
    try:
        loaded = [NoiseResult.load(path) for _ in range(1000)]
    finally:
        process.kill()
        process.wait()
    assert {(found.provenance["steps"], len(found.losses)) for found in loaded} == {(1, 1), (2, 2)}


def test_numbers_of_numpy_and_torch_are_saved_and_other_objects_are_named(saved, tmp_path):
    found = NoiseResult.load(saved)
    found.reports["mine"] = {"best": numpy.float32(0.5), "rows": torch.tensor([1, 2]), "count": numpy.int64(3)}
    found.save(tmp_path / "x")
    assert NoiseResult.load(tmp_path / "x").reports["mine"] == {"best": 0.5, "rows": [1, 2], "count": 3}
    for wrong in (object(), {numpy.int64(1): 2}, {1j}):
        found.reports["mine"] = wrong
        with pytest.raises(ValueError, match="Expected provenance and reports as JSON values, but got .*`reports`"):
            found.save(tmp_path / "x")


def test_deep_reports_are_read_if_they_can_be_written(saved, tmp_path):
    found = NoiseResult.load(saved)
    found.reports = nested({}, 98)["reports"]  # in the header, in `reports`
    found.save(tmp_path / "x")
    assert NoiseResult.load(tmp_path / "x").reports == found.reports
    found.reports = nested({}, 99)["reports"]
    with pytest.raises(ValueError, match="the result has a header of more than 100 levels"):
        found.save(tmp_path / "x")


def test_reports_that_could_not_be_read_again_are_not_written(saved, tmp_path):
    found = NoiseResult.load(saved)
    found.reports["log"] = ["step"] * 500_000
    with pytest.raises(ValueError, match="Expected a result of at most .* Put less into `reports`"):
        found.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .*nothing.safetensors"):
        NoiseResult.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    "write",
    [
        tensors(initial_noise=None, band_changes=None),
        header(lambda found: {name: value for name, value in found.items() if name != "reports"}),
        header(lambda found: {**found, "provenance": {"generators": "list"}}),
        tensors(noise=lambda old: old.double(), latents=lambda old: old.bfloat16(), losses=lambda old: old * torch.nan),
    ],
    ids=["of the first version", "without reports", "by hand", "of other precisions"],
)
def test_files_of_older_versions_and_other_runs_are_read(write, saved, tmp_path):
    write(tmp_path / "found.safetensors", saved)
    found, known = NoiseResult.load(tmp_path / "found.safetensors"), NoiseResult.load(saved)
    assert torch.equal(found.noise.float(), known.noise) and torch.equal(found.best_step, known.best_step)
    assert found.scores.keys() == known.scores.keys() == {"redness"}


def test_an_error_is_short_whatever_the_file_says(saved, tmp_path):
    header(lambda found: {**found, **{"x" * 10_000 + str(index): 1 for index in range(100)}})(tmp_path / "x", saved)
    with pytest.raises(ValueError, match="unknown metadata xxx") as error:
        NoiseResult.load(tmp_path / "x")
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def damaged(whole: bytes, seed: int) -> bytes:
    """Return a file with a flipped bit, a replaced byte, or a lost or doubled piece; every other one in the header."""
    dice = random.Random(seed)
    header = 8 + int.from_bytes(whole[:8], "little")
    place = dice.randrange(header if seed % 2 else len(whole))
    kinds = {
        "flip": lambda: whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1 :],
        "replace": lambda: whole[:place] + dice.randbytes(1) + whole[place + 1 :],
        "cut": lambda: whole[:place],
        "lose": lambda: whole[:place] + whole[place + dice.randrange(1, 9) :],
        "double": lambda: whole[:place] + whole[place : place + dice.randrange(1, 9)] + whole[place:],
    }
    return kinds[dice.choice(["flip"] * 3 + list(kinds))]()


def test_damage_anywhere_gives_a_valid_result_or_one_clear_error(saved, tmp_path):
    whole, path, messages = saved.read_bytes(), tmp_path / "damaged.safetensors", []
    for seed in range(800):
        path.write_bytes(damaged(whole, seed))
        try:
            found = NoiseResult.load(path)
        except ValueError as error:
            messages.append(str(error))
            continue
        assert found.noise.shape == found.initial_noise.shape == (BATCH, 4, 16, 16)
        assert found.noise.isfinite().all() and found.latents.isfinite().all()
        assert found.losses.shape == found.norms.shape == found.band_changes.shape[:2] == (STEPS, BATCH)
        assert all(values.shape == (STEPS, BATCH) for values in found.scores.values())
        assert repr(found) and len(found.generator()) == BATCH
    assert 400 < len(messages) < 800
    assert all("NoiseResult.save" in message and path.name in message for message in messages)


def test_a_file_is_replaced_atomically(saved, tmp_path):
    """Loaded tensors stay valid when their file is overwritten, and no temporary file is left."""
    path = tmp_path / "result.safetensors"
    path.write_bytes(saved.read_bytes())
    found, before = NoiseResult.load(path), NoiseResult.load(saved)
    found.reports["more"] = [1.0] * 1000
    found.save(path)
    assert torch.equal(found.noise, before.noise) and NoiseResult.load(path).reports["more"] == [1.0] * 1000
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_write_that_is_interrupted_leaves_what_was_there(error, saved, tmp_path, monkeypatch):
    def half(path, content):
        with path.open("wb") as file:
            file.write(content[:1000])
        raise error("half")

    found, path = NoiseResult.load(saved), tmp_path / "result.safetensors"
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(error):
        found.save(path)
    assert not list(tmp_path.iterdir())
    shutil.copy(saved, path)
    with pytest.raises(error):
        found.save(path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name] and path.read_bytes() == saved.read_bytes()


FOLDERS = ("pipelines", "rewards", "schedulers", "callbacks", "src/noiseopt")
SOURCES = {path.resolve() for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")}


def unpickling(tree: ast.AST) -> list[int]:
    """Return the lines that could unpickle: imports of pickle and the like, and arguments that allow it."""
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [node.lineno for name in names if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib"}]
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            allows = (node.arg, node.value.value) in {("weights_only", False), ("allow_pickle", True)}
            found += [node.value.lineno] if allows else []
    return found


def test_no_source_can_unpickle():
    planted = "import pickle\nfrom joblib import load\ntorch.load(x, weights_only=False)\nnp.load(x, allow_pickle=True)"
    assert unpickling(ast.parse(planted)) == [1, 2, 3, 4] and len(SOURCES) > 150
    assert {path.name: lines for path in SOURCES if (lines := unpickling(ast.parse(path.read_text())))} == {}
