"""The settings of one method as arguments of a pipeline's call."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, get_type_hints

from .hook import NoiseOptimizationMixin
from .method import NoiseOptimizer


class MethodMixin(NoiseOptimizationMixin):
    """Base class of the mixins of one method: `class ReNOMixin(MethodMixin, method=ReNO, arguments=("rewards", …))`.

    The call of a pipeline then takes these settings of the method as arguments, and its other settings in
    `method_kwargs`.

    Attributes:
        own_method: The method.
        own_arguments: The settings that are arguments of the call.
        target: The setting without which the call is the stock call; `None` for a method that is always on.
    """

    own_method: ClassVar[type[NoiseOptimizer]]
    own_arguments: ClassVar[tuple[str, ...]] = ()
    target: ClassVar[str | None] = None

    def __init_subclass__(
        cls,
        method: type[NoiseOptimizer] | None = None,
        arguments: tuple[str, ...] = (),
        target: str | None = None,
        **kwargs: Any,
    ) -> None:
        if method is not None:
            cls.own_method, cls.own_arguments, cls.target = method, arguments, target
        super().__init_subclass__(**kwargs)

    @classmethod
    def own_parameters(cls) -> list[inspect.Parameter]:
        hints = get_type_hints(cls.own_method)
        settings = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[name] | None)
            for name in cls.own_arguments
        ]
        return [*settings, *super().own_parameters()]

    @classmethod
    def call_documentation(cls) -> str:
        """Insert the arguments of the mixin before those of every pipeline."""
        mixin = next(base for base in cls.__mro__ if "own_method" in vars(base))
        summary, arguments = inspect.cleandoc(mixin.__doc__ or "").split("Args:\n")
        _, common = super().call_documentation().split("Args:\n")
        return f"{summary}Args:\n{arguments}\n{common}"

    def __call__(self, *args, method: Any = None, method_kwargs: Mapping[str, Any] | None = None, **kwargs):
        given = {name: kwargs.pop(name) for name in self.own_arguments if name in kwargs}
        settings = {name: value for name, value in given.items() if value is not None}
        if method is None:
            settings = merged_settings(settings, method_kwargs)
            method, method_kwargs = self.method_of(settings), None
        elif settings:
            raise ValueError(
                f"Expected `method` or {sorted(settings)}, but got both. Give these to the method: "
                "`method_kwargs={...}`."
            )
        return super().__call__(*args, method=method, method_kwargs=method_kwargs, **kwargs)

    @classmethod
    def method_of(cls, settings: dict[str, Any]) -> NoiseOptimizer | None:
        """Return the method with these settings; `None` for the stock call.

        Raises:
            ValueError: For settings without the argument `target` that turns the method on, such as `rewards`.
        """
        if cls.target is None:
            steps = settings.get("steps")
            return None if type(steps) is int and steps == 0 else cls.own_method(**settings)
        if cls.target not in settings:
            if settings:
                raise ValueError(
                    f"Expected `{cls.target}` beside {sorted(settings)}, but got none: there is nothing to optimize. "
                    f"Pass `{cls.target}` too, or leave these out."
                )
            return None
        return cls.own_method(**settings)


def merged_settings(arguments: dict[str, Any], others: Mapping[str, Any] | None) -> dict[str, Any]:
    """Merge settings given as arguments and in `method_kwargs`.

    Raises:
        ValueError: For one given in both.
        TypeError: If `method_kwargs` is no mapping of names.
    """
    if others is not None and not (isinstance(others, Mapping) and all(isinstance(name, str) for name in others)):
        raise TypeError(
            f"Expected `method_kwargs` to be a dict of settings by name, but got {others!r}. Pass "
            "`method_kwargs={...}`."
        )
    if twice := sorted(arguments.keys() & (others or {}).keys()):
        raise ValueError(
            f"Expected each setting once, but got {twice} as arguments and in `method_kwargs` too. Leave one out."
        )
    return {**arguments, **(others or {})}
