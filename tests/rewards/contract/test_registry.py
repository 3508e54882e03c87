"""Registration and lookup of rewards."""

import json
from pathlib import Path

import pytest
import torch

from noiseopt.rewards import (
    AutoReward,
    CLIPScore,
    ColorChannel,
    Reward,
    RewardSum,
    list_rewards,
    register_reward,
)
from noiseopt.rewards.contract.registry import REWARD_LOADERS, REWARDS


@pytest.fixture(autouse=True)
def own_tables(monkeypatch: pytest.MonkeyPatch):
    """Registrations of a test end with it."""
    for registry in (REWARDS, REWARD_LOADERS):
        monkeypatch.setattr(registry, "entries", dict(registry.entries))
        monkeypatch.setattr(registry, "aliases", dict(registry.aliases))


def define_glow() -> type[Reward]:
    """Each call defines the class anew, as executing its module again does."""

    class Glow(Reward):
        name = "glow"
        requires_prompt = False

        def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return images.mean((1, 2, 3))

    return Glow


def test_lists_names_without_aliases():
    register_reward("glow", "luma")(define_glow())
    assert list_rewards() == sorted(list_rewards())
    assert "glow" in list_rewards() and "luma" not in list_rewards()
    assert AutoReward.from_pretrained("luma").name == "glow"


def test_registering_the_same_code_again_replaces_it():
    first, second = define_glow(), define_glow()
    assert register_reward("glow")(first) is first
    register_reward("glow")(second)
    assert type(AutoReward.from_pretrained("glow")) is second


def test_a_taken_name_is_refused_and_nothing_is_registered():
    with pytest.raises(ValueError, match="Expected a free reward name, but 'red' is taken by `red_channel`"):
        register_reward("glow", "red")(define_glow())
    assert "glow" not in list_rewards()
    with pytest.raises(ValueError, match="'clip' is taken by `CLIPScore`"):
        register_reward("luma", loads=("bert", "clip"))(define_glow())
    assert "luma" not in list_rewards() and "bert" not in REWARD_LOADERS
    with pytest.raises(ValueError, match="'red' is taken by"):
        register_reward("red", loads="bert")(define_glow())
    assert "bert" not in REWARD_LOADERS


def test_a_factory_can_be_registered():
    @register_reward("crimson")
    def crimson() -> ColorChannel:
        return ColorChannel("red")

    assert AutoReward.from_pretrained("crimson", dtype=torch.float16, device="cpu")(torch.zeros(1, 3, 2, 2)) == 0


def test_a_name_loads_the_default_checkpoint(clip_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CLIPScore, "default_checkpoint", str(clip_folder))
    assert isinstance(AutoReward.from_pretrained("clipscore"), CLIPScore)


def test_an_unknown_name_lists_what_exists():
    with pytest.raises(ValueError, match=r"\[.*'clipscore', .*'green'.*\].*'CLIPScor'.*Did you mean 'clipscore'"):
        AutoReward.from_pretrained("CLIPScor")
    for missing in ("nothing-like-it", "./no/such/folder", "/no/such/folder", "a/b/c"):
        with pytest.raises(ValueError, match="Expected a reward out of"):
            AutoReward.from_pretrained(missing)


def test_a_checkpoint_of_another_model_type_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"Expected a checkpoint of the model type or arch.*'clip'.*of type 'bert'"):
        AutoReward.from_pretrained(tmp_path)


def test_a_default_checkpoint_or_weights_file_names_its_class(tmp_path: Path):
    class Owner(Reward):
        default_checkpoint, weights_file = "org/weights", "head.pt"

        @classmethod
        def load(cls, checkpoint, hub):
            return cls()

    register_reward("owner")(Owner)
    (tmp_path / "head.pt").touch()
    assert isinstance(AutoReward.from_pretrained("org/weights"), Owner)
    assert isinstance(AutoReward.from_pretrained(tmp_path), Owner)


def test_an_architecture_is_looked_up_before_the_model_type(tmp_path: Path):
    class Narrow(Reward):
        @classmethod
        def load(cls, checkpoint, hub):
            return cls()

    register_reward("narrow", loads="CLIPSpecial")(Narrow)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPSpecial"]}))
    assert isinstance(AutoReward.from_pretrained(tmp_path), Narrow)


def test_a_new_class_can_claim_a_model_type(tmp_path: Path):
    @register_reward("bertscore", loads=("bert", "BertModel"))
    class BertScore(Reward):
        @classmethod
        def load(cls, checkpoint, hub):
            assert checkpoint == str(tmp_path) and hub["local_files_only"]
            return cls()

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert isinstance(AutoReward.from_pretrained(tmp_path, local_files_only=True), BertScore)


def test_a_reward_that_is_not_on_the_hub_says_where_it_is_before_anything_is_loaded():
    class Elsewhere(Reward):
        name, weights_file, published_at = "elsewhere", "head.pth", "the site of its authors"

    register_reward("elsewhere")(Elsewhere)
    for load in (AutoReward.from_pretrained, lambda name: RewardSum(["clipscore", name])):
        with pytest.raises(ValueError, match="'elsewhere', whose weights .* Download head.pth from the site of"):
            load("elsewhere")


def test_a_class_without_a_checkpoint_says_so():
    with pytest.raises(ValueError, match="`Glow` has no default checkpoint. Pass a Hub id or a folder"):
        define_glow().from_pretrained()
    with pytest.raises(NotImplementedError, match="`Glow` has no weights to load"):
        define_glow().from_pretrained("org/name")


def test_the_name_of_an_embedded_reward_in_commands_is_told_where_it_is():
    with pytest.raises(ValueError, match=r"the embedded 'clip' is in `noiseopt.shapes_world.path\('clip'\)`"):
        AutoReward.from_pretrained("clip")
