"""Reward from any function of one image and its prompt, such as a web service or a person."""

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

from ...checked_fields import refused_signature
from .reward import NonFiniteReward, Reward, callable_name

LONGEST_WAIT = 1.0  # seconds until Ctrl-C is noticed


@dataclass(frozen=True)
class BlackBoxQuestion:
    """An image and its prompt, to be scored.

    Attributes:
        index: The position in the batch.
        key: A cache key that is equal for equal pixels and prompt.
    """

    index: int
    image: Image.Image
    prompt: str
    key: tuple[bytes, str]

    @classmethod
    def of(cls, index: int, pixels: Tensor, prompt: str) -> "BlackBoxQuestion":
        """Build a question from (H, W, 3) uint8 `pixels` on the CPU."""
        array = pixels.contiguous().numpy()
        key = hashlib.sha256(str(array.shape).encode() + array.tobytes()).digest()
        return cls(index, Image.fromarray(array), prompt, (key, prompt))


class BlackBox(Reward):
    """Reward from a function `score(image, prompt) -> float` of one PIL image and its prompt.

    Images are scored in parallel threads. A call that raises is retried after 1, 2, 4, ... times `backoff` seconds.
    When the last retry fails, or on Ctrl-C, the error is raised immediately and no new calls start; running calls are
    not interrupted. Scores are cached by image and prompt. There is no gradient, so the reward is for gradient-free
    methods such as `BestOfN`, `ZeroOrderSearch` or `PCN`.

    Args:
        score: A thread-safe function of an 8-bit RGB image and the prompt. Its result is converted to float; higher is
            better. Its `name`, `requires_prompt`, `range` and `license` are used if it has them.
        workers: The maximum number of concurrent calls, at least 1; use 1 for a person.
        retries: The number of retries of a call that raises, at least 0.
        timeout: The time limit of one call in seconds; `None` for no limit. A call that exceeds it counts as failed,
            but its thread keeps running, because Python cannot stop threads.
        backoff: The delay before the first retry in seconds, at least 0.
        name: The name under which scores are reported; by default the name of the function.

    Raises:
        RuntimeError: When scoring, if the last retry failed; the message names image and prompt.
        NonFiniteReward: When scoring, for a score that is NaN or infinite.
        TypeError: When scoring, for a score that is not a number.
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
        if parameters := refused_signature(score, 2):
            raise TypeError(
                f"Expected a function `score(image, prompt) -> float`, but '{callable_name(score)}' takes {parameters}."
            )
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
        """Score all questions concurrently, or raise the error of the first one that failed."""
        over = threading.Event()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix=f"black box {self.name}")
        try:
            futures = [pool.submit(self.ask, question, over) for question in questions]
            waiting: set[Future[None]] = set(futures)
            while waiting:  # in turns, as a signal can come just before a wait that it would end
                done, waiting = wait(waiting, LONGEST_WAIT, FIRST_EXCEPTION)
                if any(future.exception() for future in done):
                    break
            for future in futures:
                if future.done():
                    future.result()
        finally:  # also on Ctrl-C, which interrupts the waiting thread
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, question: BlackBoxQuestion, over: threading.Event) -> None:
        """Score one question with retries and cache the result. Stop when `over` is set, as any failure does."""
        try:
            for tries in range(self.retries + 1):
                ended = over.wait(self.backoff * 2 ** (tries - 1)) if tries else over.is_set()
                if ended or self.tried(question, tries):
                    return
        except Exception:
            over.set()
            raise

    def tried(self, question: BlackBoxQuestion, tries: int) -> bool:
        """Ask once, and return whether the answer came. The last try raises its error instead."""
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
            f"{self.retries + 1} tries failed, the last with {type(error).__name__}: {error}. Increase `retries`, "
            "`backoff` or `timeout` if the service recovers."
        )

    def checked(self, answer: Any, question: BlackBoxQuestion) -> float:
        where = f"from '{self.name}' for image {question.index} of the prompt {question.prompt!r}"
        try:
            value = float(answer)
        except (TypeError, ValueError):
            raise TypeError(f"Expected a number {where}, but got {answer!r}. Return a float.") from None
        if not math.isfinite(value):
            raise NonFiniteReward(
                f"Expected a finite number {where}, but got {value}. Raise an error for an image without a score."
            )
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
    """Call a function with a time limit. On `TimeoutError` its thread keeps running in the background."""
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
