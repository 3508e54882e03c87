"""Soft-TIFA: atoms in, one number per prompt out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlm_rewards import build_vqa_scorer

from noiseopt.evaluation.prompt_sets import load_prompts
from noiseopt.rewards import SoftTIFA, VQAScorer, check_gradient, geneval2_atoms

ATOMS = {
    "two green cars": [("How many cars are there ?", ["two", "Two", "2"]), ("Is the car green ?", ["Yes", "yes"])],
    "a red cube": [("Is the cube red ?", ["Yes"])],
}
PROMPTS = ["two green cars", "a red cube"]


def random_images() -> torch.Tensor:
    return 0.3 + 0.4 * torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(5))


def soft_tifa(**arguments: Any) -> SoftTIFA:
    return SoftTIFA(build_vqa_scorer(), ATOMS, **arguments)


def probability(image: torch.Tensor, question: str, answers: list[str]) -> torch.Tensor:
    """Of one atom: a scorer that asks its question and nothing else."""
    model, processor = (scorer := build_vqa_scorer()).model, scorer.processor
    asked = VQAScorer(model, processor, question="{} Answer in one word.", answers=answers)
    return asked(image[None], question)[0]


def test_means_are_those_of_the_probabilities_of_the_atoms():
    images = random_images()
    p = [
        torch.stack([probability(image, *atom) for atom in ATOMS[prompt]])
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    expected = {
        "arithmetic": [each.mean() for each in p],
        "geometric": [each.prod() ** (1 / len(each)) for each in p],
        "product": [each.prod() for each in p],
    }
    for mean, values in expected.items():
        torch.testing.assert_close(soft_tifa(mean=mean)(images, PROMPTS), torch.stack(values), rtol=1e-4, atol=1e-9)
    assert p[0].numel() == 2 and p[1].numel() == 1


@pytest.mark.parametrize("mean", ["arithmetic", "geometric", "product"])
def test_gradient_agrees_with_finite_differences(mean: str):
    reward = soft_tifa(mean=mean).double()
    images = random_images().double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS).sum(), images)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (reward.score(images + step * direction, PROMPTS).sum() for step in (1e-3, -1e-3))
    assert ((ahead - behind) / 2e-3).item() == pytest.approx(gradient.norm().item(), rel=0.01)


def test_meets_the_contract_of_rewards():
    reward = soft_tifa()
    scores = reward(random_images(), PROMPTS)
    assert scores.shape == (2,) and scores.dtype == torch.float32 and reward.name == "soft_tifa"
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    singles = [reward(image[None], prompt) for image, prompt in zip(random_images(), PROMPTS, strict=True)]
    torch.testing.assert_close(scores, torch.cat(singles), rtol=1e-4, atol=1e-7)
    check_gradient(reward, prompts="a red cube")


def test_a_score_of_many_unlikely_atoms_does_not_underflow():
    reward = SoftTIFA(build_vqa_scorer(), {"a red cube": ATOMS["a red cube"] * 60})
    (log_p,) = reward.atom_log_probabilities(random_images()[:1], ["a red cube"])
    assert log_p.sum().exp() == 0
    torch.testing.assert_close(reward(random_images()[:1], "a red cube")[0], log_p[0].exp())


def test_reads_geneval_2(tmp_path: Path):
    line = {"prompt": "two metal toys", "atom_count": 2, "skills": ["count", "attribute"]}
    line |= {"vqa_list": [["How many toys are in the image?", "two"], ["Are the toys metal?", "Yes"]]}
    (tmp_path / "geneval2_data.jsonl").write_text(json.dumps(line) + "\n")
    (prompt,) = load_prompts(str(tmp_path / "geneval2_data.jsonl")).prompts
    many, metal = geneval2_atoms(prompt.metadata["vqa_list"])
    assert many == ("How many toys are in the image?", ["two", "Two", "2", " two", " Two", " 2"])
    assert metal == ("Are the toys metal?", ["Yes", "yes", " Yes", " yes"])
    reward = SoftTIFA(build_vqa_scorer(), {prompt.text: [many, metal]})
    assert 0 < reward(random_images(), prompt.text).min() <= 1


def test_bad_input():
    with pytest.raises(ValueError, match=r"Expected a mean out of \('arithmetic', .*'harmonic'"):
        soft_tifa(mean="harmonic")
    with pytest.raises(ValueError, match="Expected an instruction with {} for the question, but got 'Say it'"):
        soft_tifa(instruction="Say it")
    with pytest.raises(ValueError, match="Expected at least one question for each prompt, but got none for 'x'"):
        SoftTIFA(build_vqa_scorer(), {"x": []})
    with pytest.raises(ValueError, match=r"whose questions are in `atoms`, but got 'a blue cube'. Add its questions"):
        soft_tifa()(random_images(), "a blue cube")
