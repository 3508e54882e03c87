"""Questions have the answers of the judge, and many at once are answered as one at a time."""

import random

import torch

from noiseopt import shapes_world
from noiseopt.shapes_world import Scene, Shape
from noiseopt.shapes_world.judge import see
from training.questions import SHOWS, Seen
from training.readers import VLMTraining

PROMPTS = ["a red circle", "a blue star left of a green cross"]


def test_many_questions_at_once_are_answered_as_one_at_a_time():
    model, images = VLMTraining().eval(), torch.rand(2, 3, 128, 128)
    asked = [[(SHOWS.format(prompt), 1) for prompt in ("a red circle", PROMPTS[1], "two blue stars")]] * 2
    logits, _, _ = model.questions(model.vlm, images, asked)
    for j, tail in enumerate(model.questions.tails(asked)[0]):
        ids = torch.tensor([model.questions.head + tail] * 2)
        alone = model.vlm(input_ids=ids, pixel_values=images * 2 - 1, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(logits[:, j], alone[:, -2:], rtol=1e-4, atol=1e-5)


def test_questions_have_the_answers_of_the_judge():
    scene = Scene((Shape("star", "red", 16, 32, 12), Shape("cross", "blue", 48, 32, 12)))
    images = (shapes_world.render([scene] * 2, torch.Generator().manual_seed(0)) * 255).byte()
    seen, rng = Seen(images, ["a red star left of a blue cross", "a red star"]), random.Random(0)
    asked = {seen.ask(row, rng) for row in (0, 1) for _ in range(300)}
    mirrored = {seen.ask(row, rng) for row in (2, 3) for _ in range(300)}
    assert seen.prompts[2:] == ["a red star right of a blue cross", "a red star"]
    assert ('does this figure show "a red star right of a blue cross" ? please answer yes or no .', 1) in mirrored
    assert ('does this figure show "a red star left of a blue cross" ? please answer yes or no .', 1) in asked
    assert ('does this figure show "a red star" ? please answer yes or no .', 0) in asked, "there is a cross too"
    assert ('is there "a red star" in this figure ? please answer yes or no .', 1) in asked
    assert {question for question, answer in asked if answer}.isdisjoint(q for q, answer in asked if not answer)


def test_each_object_that_a_question_names_has_its_count_and_center():
    questions = VLMTraining().questions
    scene = Scene((Shape("star", "red", 16, 32, 12), Shape("star", "red", 48, 32, 12)))
    things = see(shapes_world.render([scene], torch.Generator().manual_seed(0)))
    asked = [[(SHOWS.format("two red stars"), 1), (SHOWS.format("a blue star left of a red star"), 0)]]
    ids, *_ = questions.sequence(questions.tails(asked))
    places, counts, centers = questions.named(ids, things)
    words = questions.tokenizer.convert_ids_to_tokens(ids[places[:, 0], places[:, 1]])
    assert words == ["stars", "star", "star"] and counts.tolist() == [2, 0, 2]
    torch.testing.assert_close(centers, torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]), atol=0.02, rtol=0)
