"""Every family with a transformer with every method and gradient route: a cell of the README's table each."""

import pytest
from conformance.checks import check_family_cell, check_off_and_class
from conformance.matrix import COLUMNS, WITH_TRANSFORMER


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("family", WITH_TRANSFORMER)
def test_cell(family, column):
    check_family_cell(family, column)


@pytest.mark.parametrize("family", WITH_TRANSFORMER)
def test_a_class_with_the_hook_is_bit_identical_when_off_and_draws_the_best_when_on(family):
    check_off_and_class(family)
