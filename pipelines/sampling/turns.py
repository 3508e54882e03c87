"""Turns of runs that share modules: a run switches modules to another state, in which no other may find them."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any


class Turn:
    """The turn of a thread with some objects, by their ids."""

    def __init__(self, thread: int, things: frozenset[int]) -> None:
        self.thread, self.things = thread, things

    def waits_for(self, other: "Turn") -> bool:
        return self.thread != other.thread and not self.things.isdisjoint(other.things)


class Turns:
    """Turns of threads with sets of objects.

    A thread waits until no other has any of its objects, and takes all of them at once, so that no two wait for each
    other. It does not wait for itself: its turns may be nested.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.taken: list[Turn] = []

    @contextlib.contextmanager
    def take(self, things: Iterable[Any]) -> Iterator[None]:
        """Hold these objects inside the context."""
        turn = Turn(threading.get_ident(), frozenset(map(id, things)))
        try:
            with self.changed:
                self.changed.wait_for(lambda: not any(map(turn.waits_for, self.taken)))
                self.taken.append(turn)
            yield
        finally:  # also of a thread that was interrupted while it waited
            with self.changed:
                self.taken = [other for other in self.taken if other is not turn]
                self.changed.notify_all()


# one for all copies of this code, of which each card of a pipeline has its own
TURNS: Turns = vars(threading).setdefault("noiseopt_turns", Turns())
