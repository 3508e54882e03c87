"""Foreign checkpoints: found, read without executing anything, and loaded strictly."""

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from noiseopt.rewards import AutoReward
from noiseopt.rewards.contract.checkpoints import (
    check_weights,
    checkpoint_path,
    holder_of,
    is_in_folder,
    load_strictly,
    read_settings,
    read_state_dict,
)
from noiseopt.rewards.vlm.clip_flant5 import read_shards

HUB = {"revision": None, "cache_dir": None, "token": None, "local_files_only": True}


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_folder_without_the_file_says_which(tmp_path: Path):
    (tmp_path / "head.pt").touch()
    assert checkpoint_path(str(tmp_path), "head.pt", HUB) == tmp_path / "head.pt"
    with pytest.raises(FileNotFoundError, match="Expected the file other.pt in .*Pass the folder that contains it"):
        checkpoint_path(str(tmp_path), "other.pt", HUB)


@pytest.mark.parametrize("wrapped", [False, True])
def test_reads_tensors_by_name(tmp_path: Path, wrapped: bool):
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "x.pt")
    save_file(state, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        read = read_state_dict(tmp_path / name)
        assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)


def test_a_pickle_that_would_execute_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"a": torch.ones(1), "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt cannot be read with `weights_only=True`"):
        read_state_dict(tmp_path / "evil.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="bare.pt cannot be read"):
        read_state_dict(tmp_path / "bare.pt")
    assert "executed" not in capsys.readouterr().out


def test_a_truncated_file_and_one_without_names_are_refused(tmp_path: Path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match="cut.pt cannot be read.*Download it again"):
        read_state_dict(tmp_path / "cut.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="Expected list.pt to hold tensors by name, but it holds list"):
        read_state_dict(tmp_path / "list.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_damage_anywhere_gives_tensors_or_one_clear_error(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("it was unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("it was unpickled"))
    dice, path, refused = random.Random(0), tmp_path / name, []
    save = torch.save if name == "x.pt" else save_file
    save({"weight": torch.ones(4, 4), "bias": torch.zeros(4)}, path)
    whole = path.read_bytes()
    for _ in range(300):
        place = dice.randrange(len(whole))
        path.write_bytes(whole[:place] + dice.choice([b"", dice.randbytes(1) + whole[place + 1 :], whole[place + 1 :]]))
        try:
            state = read_state_dict(path)
        except ValueError as error:
            refused.append(str(error))
            continue
        assert all(type(key) is str and isinstance(value, torch.Tensor) for key, value in state.items())
    assert len(refused) > 150 and all(name in message for message in refused)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 200_000, "1" * 10_000])
def test_settings_that_are_no_object_are_refused_by_name(tmp_path: Path, text: str):
    (tmp_path / "med_config.json").write_text(text)
    with pytest.raises(ValueError, match="Expected .* in med_config.json.*Download it again"):
        read_settings(tmp_path / "med_config.json")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": "../../x.bin"}}])
def test_an_index_that_lists_no_files_of_its_folder_is_refused(tmp_path: Path, index: dict):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json to list files of its folder"):
        read_shards(str(tmp_path), HUB)


def test_a_part_is_read_from_a_folder_that_has_it_and_else_from_the_companion(tmp_path: Path):
    hub = {**HUB, "revision": "v2"}
    (tmp_path / "tokenizer_config.json").touch()
    assert holder_of("tokenizer_config.json", str(tmp_path), "org/clip", hub) == (str(tmp_path), hub)
    assert holder_of("config.json", str(tmp_path), "org/clip", hub) == ("org/clip", HUB)
    assert holder_of("config.json", "org/finetuned", "org/clip", hub) == ("org/clip", HUB)


@pytest.mark.parametrize(
    ("text", "found"), [('{"processor_class": "CLIPProcessor"}', False), ('{"image_processor": {}}', True)]
)
def test_an_image_processor_may_be_part_of_the_file_of_a_whole_processor(tmp_path: Path, text: str, found: bool):
    assert not is_in_folder("preprocessor_config.json", str(tmp_path))
    (tmp_path / "processor_config.json").write_text(text)
    assert is_in_folder("preprocessor_config.json", str(tmp_path)) is found
    assert not is_in_folder("tokenizer_config.json", str(tmp_path))


def test_weights_are_checked_against_a_module_without_storage():
    with torch.device("meta"):
        layer = nn.Linear(2, 3)
    check_weights(layer, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "head.pt")
    with pytest.raises(ValueError, match="head.pt .* of Linear, but missing: bias"):
        check_weights(layer, {"weight": torch.ones(3, 2)}, "head.pt")


def test_loads_exactly_or_names_what_is_wrong():
    layer, state = nn.Linear(2, 3), {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    load_strictly(layer, state, "head.pt")
    assert torch.equal(layer.weight, torch.ones(3, 2))
    wrong = {"weight": torch.ones(3, 4), "scale": torch.ones(1)}
    with pytest.raises(
        ValueError,
        match=r"Expected head.pt to hold exactly the weights of Linear, but missing: bias; unexpected: scale; "
        r"of another shape: weight \(3, 4\) for \(3, 2\)",
    ):
        load_strictly(layer, wrong, "head.pt")
    assert torch.equal(layer.weight, torch.ones(3, 2))


def test_a_model_that_is_not_whole_is_refused_by_the_names_of_what_it_lacks(clip_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "part"))
    state = load_file(folder / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="all weights of CLIPModel, but missing: text_projection.weight"):
        AutoReward.from_pretrained(folder)
