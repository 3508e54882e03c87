"""Soft-TIFA: a prompt as a list of questions, each answered by a vision-language model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..contract.reward import Reward
from .vqa_score import VQAScorer

SoftTIFAMean = Literal["arithmetic", "geometric", "product"]
NUMERALS = {
    word: str(number)
    for number, word in enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=1
    )
}
Atom = tuple[str, Sequence[str]]


class SoftTIFA(Reward):
    """Mean probability of the right answers to questions about a prompt, by a vision-language model.

    GenEval 2: https://arxiv.org/abs/2512.16853. Each atom is a question and the accepted spellings of its answer; its
    score is the probability that the answer begins with one of them. GenEval 2 uses the arithmetic mean to evaluate
    atoms and the geometric mean to evaluate whole prompts, with Qwen/Qwen3-VL-8B-Instruct.

    The class is not registered, because a name does not determine the questions. With the file of the benchmark:

        prompts = load_prompts("geneval2_data.jsonl").prompts
        atoms = {prompt.text: geneval2_atoms(prompt.metadata["vqa_list"]) for prompt in prompts}
        reward = SoftTIFA(VQAScorer.from_pretrained("Qwen/Qwen3-VL-8B-Instruct"), atoms)

    Args:
        scorer: The vision-language model; its own question and mode are not used.
        atoms: Prompt -> its questions, each with the accepted answers.
        mean: The reduction over the atoms of a prompt, with a result in [0, 1]. "product" is the probability that all
            answers are right.
        instruction: The text of a query, with "{}" for the question.

    Raises:
        ValueError: For an unknown mean, an instruction without "{}", or a prompt without questions.
    """

    name = "soft_tifa"
    range = (0.0, 1.0)
    scorer: VQAScorer

    def __init__(
        self,
        scorer: VQAScorer,
        atoms: Mapping[str, Sequence[Atom]],
        mean: SoftTIFAMean = "geometric",
        instruction: str = "{} Answer in one word.",
    ):
        if mean not in get_args(SoftTIFAMean):
            raise ValueError(f"Expected a mean out of {get_args(SoftTIFAMean)}, but got {mean!r}.")
        if "{}" not in instruction:
            raise ValueError(f"Expected an instruction with {{}} for the question, but got {instruction!r}.")
        if empty := [prompt for prompt, questions in atoms.items() if not questions]:
            raise ValueError(f"Expected at least one question for each prompt, but got none for {empty[0]!r}.")
        super().__init__(scorer=scorer)
        self.atoms = dict(atoms)
        self.mean = mean
        self.instruction = instruction
        self.license = scorer.license

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        if unknown := [prompt for prompt in prompts if prompt not in self.atoms]:
            raise ValueError(
                f"Expected prompts whose questions are in `atoms`, but got {unknown[0]!r}. Add its questions, each "
                'with the accepted answers: `{prompt: [("How many pigs are there?", ["two", "2"])]}`.'
            )
        return torch.stack([self.combined(log_p) for log_p in self.atom_log_probabilities(images, prompts)])

    def atom_log_probabilities(self, images: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """Return, for each image, the log-probabilities (atoms,) of the right answers to its prompt's questions."""
        counts = [len(self.atoms[prompt]) for prompt in prompts]
        atoms = [atom for prompt in prompts for atom in self.atoms[prompt]]
        questions = [self.instruction.replace("{}", question) for question, _ in atoms]
        repeated = images.repeat_interleave(torch.tensor(counts, device=images.device), 0)
        log_p = self.scorer.answer_log_probability(repeated, questions, [answers for _, answers in atoms])
        return list(log_p.split(counts))

    def combined(self, log_p: Tensor) -> Tensor:
        """Reduce log-probabilities (atoms,) to a scalar in [0, 1]."""
        if self.mean == "arithmetic":
            return log_p.exp().mean()
        return (log_p.mean() if self.mean == "geometric" else log_p.sum()).exp()


def geneval2_atoms(vqa_list: Iterable[Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Convert the (question, answer) pairs of a line of GenEval 2 to atoms, with the spellings that it accepts.

    Source: `soft_tifa` in https://github.com/facebookresearch/GenEval2, `evaluation.py`.
    """
    atoms = []
    for question, answer in vqa_list:
        if question.startswith("How many"):
            words = [answer, answer.capitalize(), NUMERALS.get(answer, "other")]
        else:
            words = ["Yes", "yes"]
        atoms.append((question, [*words, *(f" {word}" for word in words)]))
    return atoms
