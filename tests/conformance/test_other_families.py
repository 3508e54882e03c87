"""Further families: every method and gradient mode, one test for each cell of the README's table."""

import pytest
from conformance.checks import check_family_cell, check_off_and_class, family_cells
from conformance.matrix import OTHERS
from tiers import slow_except


@pytest.mark.parametrize(("family", "column"), family_cells(OTHERS))
def test_cell(family, column):
    check_family_cell(family, column)


@pytest.mark.parametrize("family", slow_except(OTHERS, "krea2"))
def test_class_with_the_hook_equals_the_stock_class_when_off_and_returns_the_best_when_on(family):
    check_off_and_class(family)
