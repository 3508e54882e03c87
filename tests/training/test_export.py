"""Exported models answer as they did in training, in stock classes."""

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from noiseopt.rewards import VQAScorer
from training.export import correct, export_vqa, shorten
from training.questions import SHOWS
from training.readers import VLMTraining

PROMPTS = ["a red circle", "a blue star left of a green cross"]


def test_the_exported_vqa_answers_as_it_did_in_training(tmp_path):
    training = VLMTraining().eval()
    images, asked = torch.rand(2, 3, 128, 128), [[(SHOWS.format(prompt), 1)] for prompt in PROMPTS]
    for parameter in training.vlm.parameters():  # what half precision keeps exactly
        parameter.data = parameter.data.half().float()
    with torch.no_grad():
        logits, _, _ = training.questions(training.vlm, images, asked)
    expected = logits[:, 0, 0].softmax(-1)[:, training.questions.answers[1]]
    export_vqa(training, tmp_path)
    correct(tmp_path / "config.json")
    reward = VQAScorer.from_pretrained(str(tmp_path))
    pixels = images.clone().requires_grad_()
    scores = reward(pixels, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)
    scores.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_the_exported_vqa_is_an_ordinary_image_text_to_text_model(tmp_path):
    training = VLMTraining().eval()
    export_vqa(training, tmp_path)
    processor, model = AutoProcessor.from_pretrained(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SHOWS.format(PROMPTS[0])}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    image = (torch.rand(128, 128, 3) * 255).byte().numpy()
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    assert (
        inputs.input_ids[0].tolist()
        == training.questions.head + training.questions.tails([[(SHOWS.format(PROMPTS[0]), 0)]])[0][0][:-1]
    )
    assert model.float().generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs.input_ids.shape[1]


def test_shortened_weights_are_the_nearest_of_ten_significant_bits(tmp_path):
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)).half()
    path = tmp_path / "model.safetensors"
    save_file({"weights": weights, "places": torch.arange(3)}, path, {"format": "pt"})
    shorten(path)
    short = load_file(path)
    exponent = torch.frexp(weights.double()).exponent
    step = torch.exp2((exponent - 10).double())  # between numbers of ten bits
    assert torch.equal((short["weights"].double() / step).frac(), torch.zeros(1000).double())
    assert ((short["weights"].double() - weights.double()).abs() <= step / 2).all()
    assert short["places"].tolist() == [0, 1, 2] and short["weights"].dtype == torch.float16
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
