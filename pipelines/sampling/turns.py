"""Turns of runs that share modules: a run switches modules to another state, in which no other may find them."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any


class Turns:
    """Turns of threads with sets of objects.

    A thread waits until no other has any of its objects, and takes all of them at once, so that no two wait for each
    other. It does not wait for itself: its turns may be nested.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.taken: list[tuple[int, frozenset[int]]] = []  # thread and objects of each turn

    @contextlib.contextmanager
    def take(self, things: Iterable[Any]) -> Iterator[None]:
        """Hold these objects inside the context."""
        turn = (threading.get_ident(), frozenset(map(id, things)))
        with self.changed:
            self.changed.wait_for(lambda: self.is_free(*turn))
            self.taken.append(turn)
        try:
            yield
        finally:
            with self.changed:
                self.taken.remove(turn)
                self.changed.notify_all()

    def is_free(self, thread: int, things: frozenset[int]) -> bool:
        return all(owner == thread or things.isdisjoint(others) for owner, others in self.taken)


TURNS = Turns()
