"""Choice of the parameters that the fast tier runs."""

from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any | ParameterSet]:
    """Return `values` as parameters of a test, all of them marked slow but those in `fast`."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
