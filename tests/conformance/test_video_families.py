"""Text-to-video pipelines: every method and gradient mode, one test for each cell of the README's table."""

import pytest
from conformance.checks import check_off_and_class, check_video_cell, family_cells
from conformance.matrix import VIDEOS
from tiers import slow_except


@pytest.mark.parametrize(("family", "column"), family_cells(VIDEOS))
def test_cell(family, column):
    check_video_cell(family, column)


@pytest.mark.parametrize("family", slow_except(VIDEOS, "wan"))
def test_class_with_the_hook_equals_the_stock_class_when_off_and_returns_the_best_when_on(family):
    check_off_and_class(family)
