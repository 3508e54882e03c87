"""The pictures of the cards: what they show is what they and the texts say, and nothing was chosen by its outcome."""

import dataclasses
import types

import pytest
import torch
from PIL import Image

from noiseopt import shapes_world
from noiseopt.cli import main
from noiseopt.hub import build, pictures
from noiseopt.hub.before_after import PICTURE, BeforeAfter
from noiseopt.hub.cards import CARDS, finding
from noiseopt.story import SET, Choice, Story

BY_NAME = {card.name: card for card in CARDS}
RED, GREEN = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])


def tell(choice):
    """A story in which every image is red, then green, and wrong, then right; and images of a set alike, then not."""
    count, sets = len(choice.prompts) * choice.count, len(choice.prompts)
    images = torch.stack([RED, GREEN])[:, None, :, None, None].expand(2, count, 3, 64, 64)
    losses = torch.tensor([[1.0] * choice.count, [0.5] * choice.count])
    result = types.SimpleNamespace(losses=losses, best_step=torch.ones(choice.count))
    verdicts = [[types.SimpleNamespace(correct=correct)] * count for correct in (False, True)]
    prompts = [prompt for prompt in choice.prompts for _ in range(choice.count)]
    features = torch.stack([torch.ones(count, SET), torch.eye(SET).repeat(sets, 1)]) if choice.ruler else None
    return Story(choice, prompts, [result] * sets, images, verdicts, features)


def words_of(readme):
    """A text without its line breaks."""
    return " ".join(readme.read_text(encoding="utf-8").split())


def share_of(picture, color):
    """Of the pixels of a picture."""
    pixels = torch.tensor(list(picture.convert("RGB").get_flattened_data())) / 255
    return ((pixels - color).abs().amax(1) < 0.2).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reno", "cno"])
def test_plain_images_are_left_of_their_arrow(method):
    picture = pictures.picture(tell(Choice.of(method, "turbo")))
    width, height = picture.size
    column = width // 4 if method == "reno" else width  # of each prompt
    left = picture.crop((0, 0, column // 2, height))
    right = picture.crop((column // 2, 0, column, height))
    assert share_of(left, RED) > 0.3 and share_of(left, GREEN) < 0.02
    assert share_of(right, GREEN) > 0.3 and share_of(right, RED) < 0.02


@pytest.mark.slow
def test_a_picture_keeps_what_it_shows(tmp_path):
    story = tell(Choice.of("cno", "guided"))
    facts = pictures.facts(story)
    assert (facts.right, facts.images, facts.count) == ([0, 4 * SET], SET, 4 * SET)
    assert (facts.measure, facts.values, facts.ruler) == ("diversity", [0, 1], "dinov2")
    facts = dataclasses.replace(facts, layout=[1.25, 2.5])  # that of red squares is none
    facts.save(pictures.picture(story), tmp_path / PICTURE)
    assert BeforeAfter.read(tmp_path / PICTURE) == facts
    with Image.open(tmp_path / PICTURE) as picture:
        assert picture.mode == "RGB"  # a palette leaves contours in smooth grounds


def test_other_files_are_no_pictures_of_a_card(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / PICTURE)
    assert BeforeAfter.read(tmp_path / PICTURE) is None and BeforeAfter.read(tmp_path / "none.png") is None


@pytest.mark.slow
def test_cards_of_one_method_and_model_share_a_run(tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(build, "HUB_CARDS", tmp_path)
    monkeypatch.setattr(pictures, "tell", lambda choice: told.append(choice) or tell(choice))
    main(["hub", "pictures", "noise-diffusion-flux", "reno-turbo", "noise-diffusion-stable-diffusion-3"])
    assert [(choice.method, choice.model.name) for choice in told] == [
        ("noise_diffusion", "sd3"),
        ("reno", "sdxl-turbo"),
    ]
    flux, sd3 = (tmp_path / f"noise-diffusion-{name}/{PICTURE}" for name in ("flux", "stable-diffusion-3"))
    assert flux.read_bytes() == sd3.read_bytes()
    assert capsys.readouterr().out.count(f"/{PICTURE}: ") == 3
    assert "0 of 8 images are right before, 8 of 8 after" in words_of(tmp_path / "reno-turbo/README.md")


def test_only_pipelines_have_pictures(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["hub", "pictures", "shapes-turbo"])
    assert "Expected a card out of reno-turbo, " in capsys.readouterr().err


def told(**changes):
    """Return what the card of CNO says about a picture."""
    facts = {"method": "cno", "model": "guided", "steps": 3, "prompts": ["two stars"] * 4, "images": 4, "seed": 0}
    facts |= {"instruments": [], "right": [7, 7], "measure": "diversity", "values": [0.1, 0.2], "ruler": "dinov2"}
    return finding(BY_NAME["cno-stable-diffusion"], BeforeAfter(**{**facts, "layout": [12.0, 15.0], **changes}))


def test_the_text_claims_no_effect_that_the_picture_lacks():
    """A sign test of 6 changes to one side gives p = 2 / 2⁶ = .03, of 5 p = .06."""
    for right, doubted in {(7, 7): False, (7, 8): True, (8, 3): True, (7, 13): False, (12, 6): False}.items():
        text = told(right=[*right])
        assert f"{right[0]} of 16 images are right before, {right[1]} of 16 after" in text
        assert ("may be chance" in text) is doubted
    for values, doubted in {(0.1, 0.2): False, (0.1, 0.105): True, (0.105, 0.1): True, (0.2, 0.1): False}.items():
        text = told(values=[*values])
        assert f"is {values[0]:g} before, {values[1]:g} after" in text
        assert ("do not visibly differ" in text) is doubted
    assert "12.0 pixels from their mean position before, 15.0 after" in told()
    assert "which the method does not use" in told() and "which the method optimizes" in told(instruments=["dinov2"])


def test_the_text_about_single_images():
    assert "is optimized: 0.5 in the mean before, 0.75 after" in told(measure="P(yes)", values=[0.5, 0.75], layout=None)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_pictures_that_are_there(name, root):
    """They are small, of the prompts and seeds of the demo, and as many images are right as the text says."""
    card, path = BY_NAME[name], root / "hub_cards" / name / PICTURE
    shown = BeforeAfter.read(path)
    assert shown is not None and path.stat().st_size < 150_000
    choice = Choice.of(card.room, card.shown_on)
    assert (shown.method, shown.model, shown.seed) == (card.room, card.shown_on, pictures.SEED)
    assert (shown.prompts, shown.images) == (choice.prompts, choice.count)
    assert (shown.steps, shown.instruments) == (choice.steps, choice.instruments)
    text, (before, after) = words_of(root / "hub_cards" / name / "README.md"), shown.right
    assert f"{before} of {shown.count} images are right before, {after} of {shown.count} after" in text
    assert f"after {choice.steps} steps of {card.method.__name__}" in text
    assert f"]({PICTURE}) " in text and f"`{shapes_world.MODELS[card.shown_on].hub_id}`" in text
    assert ("which sees images through" in text) == bool(choice.instruments)


def test_a_model_of_another_kind_is_said_to_be_one(root):
    for card in CARDS:
        text = words_of(root / "hub_cards" / card.name / "README.md")
        assert ("There is no embedded model of the FLUX kind" in text) == (card.stock.__name__ == "FluxPipeline")
