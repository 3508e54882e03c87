"""The kind of a prompt by its words."""

import pytest

from noiseopt.rewards import prompt_kind


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("a red apple and a yellow banana", "color"),
        ("A Golden crown.", "color"),
        ("an oval mirror", "shape"),
        ("a big dog and a tiny bird", "shape"),
        ("a wooden table and a leather sofa", "texture"),
        ("a cat on the left of a dog", "2d_spatial"),
        ("a cat left of a dog", "2d_spatial"),
        ("a lamp next\n to a book", "2d_spatial"),
        ("a dog behind a tree", "3d_spatial"),
        ("a bicycle in front of a house", "3d_spatial"),
        ("three dogs", "numeracy"),
        ("12 eggs", "numeracy"),
        ("a girl is holding an umbrella", "non_spatial"),
        ("people were slowly crossing a street", "non_spatial"),
        ("two red squirrels", "complex"),
        ("a blue star above a green circle", "complex"),
        ("a girl is holding a red umbrella", "complex"),
        ("a wooden table behind a round window", "complex"),
        ("a castle at dawn", "general"),
        ("a girl left the house", "general"),  # "left" alone is no place
        ("a spring morning", "general"),  # nor "-ing" an action
        ("a bored woman in Greenland", "general"),  # words, not parts of them
        ("", "general"),
    ],
)
def test_the_words_tell_the_kind(prompt, kind):
    assert prompt_kind(prompt) == kind


@pytest.mark.parametrize("prompt", [None, ["a cat", "a dog"], 3])
def test_it_takes_one_text(prompt):
    with pytest.raises(TypeError, match="Expected one prompt as a text, but got .*one prompt at a time"):
        prompt_kind(prompt)
