"""Any function of one image as a reward, asked in threads: a service on the network, a person."""

import hashlib
import math
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .reward import NonFiniteReward, Reward, callable_name


@dataclass(frozen=True)
class BlackBoxQuestion:
    """An image and its prompt, to be asked about.

    Attributes:
        index: its place among the images of the call.
        key: equal for equal pixels and prompt.
    """

    index: int
    image: Image.Image
    prompt: str
    key: tuple[bytes, str]

    @classmethod
    def of(cls, index: int, pixels: Tensor, prompt: str) -> "BlackBoxQuestion":
        """From `pixels` (H, W, 3) uint8 on the CPU."""
        array = pixels.contiguous().numpy()
        key = hashlib.sha256(str(array.shape).encode() + array.tobytes()).digest()
        return cls(index, Image.fromarray(array), prompt, (key, prompt))


class BlackBox(Reward):
    """`score(image, prompt) -> float`, of one PIL image and its prompt, as a reward: a web service, a person.

    Images are asked about in threads. A call that raises is tried again after 1, 2, 4 ... times `backoff` seconds. When
    the last try fails, or Ctrl-C is pressed, nothing more is asked and the error is raised at once; what is under way
    then ends by itself. An image and prompt that were answered are not asked about again, so that an image that stays
    the same costs one call. There is no gradient: for methods without, such as `BestOfN`, `ZeroOrderSearch` or `PCN`.

    Args:
        score: called with an RGB image of 8 bits and the prompt, from several threads at a time; what it returns is
            made a float, higher is better. Its `name`, `requires_prompt`, `range` and `license` are taken over where it
            has them.
        workers: how many calls may be under way at a time, at least 1; 1 for a person.
        retries: how many times more a call is tried that raises, at least 0.
        timeout: seconds for one try; a longer one counts as failed, and goes on unseen, as no thread can be ended.
            `None` to wait for ever.
        backoff: seconds before the second try, at least 0.
        name: what its scores are called; by default the name of the function.

    Raises:
        RuntimeError: from a call, naming image and prompt whose last try failed; its cause is what was raised.
        NonFiniteReward: from a call, for an answer that is NaN or infinite.
        TypeError: from a call, for an answer that is no number.
    """

    differentiable = False

    def __init__(
        self,
        score: Callable[[Image.Image, str], float],
        workers: int = 4,
        retries: int = 3,
        timeout: float | None = None,
        *,
        backoff: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not callable(score) or isinstance(score, type):
            raise TypeError(f"Expected a function `score(image, prompt) -> float`, but got {score!r}.")
        check_asking(workers, retries, timeout, backoff)
        self.asked, self.name = score, name or callable_name(score)
        self.workers, self.retries, self.timeout, self.backoff = workers, retries, timeout, backoff
        self.requires_prompt = getattr(score, "requires_prompt", True)
        self.range, self.license = getattr(score, "range", None), getattr(score, "license", None)
        self.answers: dict[tuple[bytes, str], float] = {}

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
        pairs = zip(pixels, prompts, strict=True)
        questions = [BlackBoxQuestion.of(index, image, prompt) for index, (image, prompt) in enumerate(pairs)]
        new = {question.key: question for question in reversed(questions) if question.key not in self.answers}
        if new:
            self.ask_all(sorted(new.values(), key=lambda question: question.index))
        answers = [self.answers[question.key] for question in questions]
        return torch.tensor(answers, dtype=torch.float32, device=images.device)

    def ask_all(self, questions: list[BlackBoxQuestion]) -> None:
        """Have all answered, or raise what the first one of those that fail raises."""
        over = threading.Event()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix=f"black box {self.name}")
        try:
            futures = [pool.submit(self.ask, question, over) for question in questions]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
        finally:  # also on Ctrl-C, which reaches the thread that waits
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, question: BlackBoxQuestion, over: threading.Event) -> None:
        """Try until there is an answer, and remember it; give up when it is `over`: a failure ends it for all."""
        try:
            for tries in range(self.retries + 1):
                ended = over.wait(self.backoff * 2 ** (tries - 1)) if tries else over.is_set()
                if ended or self.tried(question, tries):
                    return
        except Exception:
            over.set()
            raise

    def tried(self, question: BlackBoxQuestion, tries: int) -> bool:
        """Whether there is an answer now; raises if there is none after the last try."""
        try:
            answer = within(self.timeout, self.asked, question.image.copy(), question.prompt)
        except Exception as error:
            if tries == self.retries:
                raise self.unanswered(question, error) from error
            return False
        self.answers[question.key] = self.checked(answer, question)
        return True

    def unanswered(self, question: BlackBoxQuestion, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"Expected a score from '{self.name}' for image {question.index} of the prompt {question.prompt!r}, but "
            f"{self.retries + 1} tries failed, the last with {type(error).__name__}: {error}. Raise `retries`, "
            "`backoff` or `timeout` if the service recovers."
        )

    def checked(self, answer: Any, question: BlackBoxQuestion) -> float:
        where = f"from '{self.name}' for image {question.index} of the prompt {question.prompt!r}"
        try:
            value = float(answer)
        except (TypeError, ValueError):
            raise TypeError(f"Expected a number {where}, but got {answer!r}. Return a float.") from None
        if not math.isfinite(value):
            raise NonFiniteReward(f"Expected a finite number {where}, but got {value}. Raise for what has no score.")
        return value


def check_asking(workers: Any, retries: Any, timeout: Any, backoff: Any) -> None:
    """Raise `ValueError` for settings of a `BlackBox` that cannot work."""
    for name, value, least in (("workers", workers, 1), ("retries", retries, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"Expected `{name}` to be an integer of {least} or more, but got {value!r}.")
    if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
        raise ValueError(f"Expected `timeout` to be more than 0 seconds, or None, but got {timeout!r}.")
    if not (isinstance(backoff, int | float) and 0 <= backoff < math.inf):
        raise ValueError(f"Expected `backoff` to be a finite number of seconds of at least 0, but got {backoff!r}.")


def within(seconds: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns or raises; `TimeoutError` if it takes longer, and its thread is left to itself."""
    if seconds is None:
        return function(*arguments)
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    wait([future], seconds)
    if not future.done():
        raise TimeoutError(f"no answer within {seconds:g} s")
    return future.result()
