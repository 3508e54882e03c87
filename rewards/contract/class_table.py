"""Classes by name: what `register_...` fills and `list_...` reads."""

import difflib
from collections.abc import Callable
from typing import Generic, TypeVar

ClassT = TypeVar("ClassT", bound=type)


class ClassTable(Generic[ClassT]):
    """Classes of one kind under their names.

    Args:
        kind: what they are, for messages: "features", "set reward".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.classes: dict[str, ClassT] = {}

    def register(self, name: str) -> Callable[[ClassT], ClassT]:
        """A decorator that enters a class.

        Raises:
            ValueError: a name that another class has. Registering again what has the same qualified name replaces it,
                since diffusers executes the code of a Hub pipeline twice per load.
        """

        def enter(entry: ClassT) -> ClassT:
            taken_by = self.classes.get(name, entry).__qualname__
            if taken_by != entry.__qualname__:
                raise ValueError(
                    f"Expected a free {self.kind} name, but '{name}' is taken by `{taken_by}`. Choose another."
                )
            self.classes[name] = entry
            return entry

        return enter

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self.classes)

    def find(self, name: str, otherwise: str = "") -> ClassT:
        """The class of a name; `otherwise` is what else would have been accepted, for the message.

        Raises:
            ValueError: for a name that is not registered.
        """
        if name not in self.classes:
            close = difflib.get_close_matches(name.lower(), self.classes)
            hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
            raise ValueError(f"Expected {self.kind} out of {self.names()}{otherwise}, but got '{name}'.{hint}")
        return self.classes[name]
