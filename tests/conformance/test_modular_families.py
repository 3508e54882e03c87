"""Modular pipelines: every method and gradient mode, one test for each cell of the README's table."""

import pytest
from conformance.checks import check_modular_cell, family_cells, modular_call
from conformance.matrix import MODULAR


@pytest.mark.parametrize(("family", "column"), family_cells(MODULAR, MODULAR))
def test_cell(family, column):
    check_modular_cell(family, column)


@pytest.mark.parametrize("family", MODULAR)
def test_row_names_the_classes(family):
    pipe, row = modular_call(family, 1).pipe, MODULAR[family]
    assert (type(pipe).__name__, type(pipe.scheduler).__name__) == (row.pipeline, row.scheduler)
