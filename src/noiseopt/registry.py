"""A registry: classes or functions of one kind by name."""

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

EntryT = TypeVar("EntryT", bound=Callable)


class Registry(Generic[EntryT]):
    """Classes or functions of one kind, by name and alias.

    Args:
        kind: The noun that error messages use: "reward", "method".

    Attributes:
        entries: Name or alias to the entry.
        aliases: Alias to the name that it stands for.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.entries: dict[str, EntryT] = {}
        self.aliases: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[EntryT], EntryT]:
        """Return a decorator that registers a class or function under a name and its aliases.

        Raises:
            ValueError: If something else has the name. An entry with the same qualified name is replaced, because
                diffusers executes the code of a Hub pipeline twice per load.
        """

        def enter(entry: EntryT) -> EntryT:
            self.check_free(entry, name, *aliases)
            self.entries |= dict.fromkeys((name, *aliases), entry)
            self.aliases |= dict.fromkeys(aliases, name)
            return entry

        return enter

    def check_free(self, entry: EntryT, *names: str) -> None:
        """Raise `ValueError` if something else than `entry`, by its qualified name, has one of the names."""
        for name in names:
            taken_by = self.entries.get(name, entry).__qualname__
            if taken_by != entry.__qualname__:
                raise ValueError(
                    f"Expected a free {self.kind} name, but {name!r} is taken by `{taken_by}`. Choose another."
                )

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> EntryT:
        return self.find(name)

    def names(self) -> list[str]:
        """Return the registered names, sorted, without aliases."""
        return sorted(self.entries.keys() - self.aliases.keys())

    def find(self, name: str, otherwise: str = "", also: Iterable[str] = ()) -> EntryT:
        """Return the entry of a name or alias.

        Args:
            name: The name.
            otherwise: Other accepted values, for the error message.
            also: Other names that the caller accepts, for the error message.

        Raises:
            ValueError: If the name is not registered; the message lists the names and the closest ones.
        """
        if name not in self.entries:
            hint = did_you_mean(name, [*also, *self.entries])
            names = sorted({*also, *self.names()})
            raise ValueError(f"Expected a {self.kind} out of {names}{otherwise}, but got {name!r}.{hint}")
        return self.entries[name]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a sentence with the known words closest to `word`, with a leading space, or an empty string."""
    close = difflib.get_close_matches(word.lower(), known)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
