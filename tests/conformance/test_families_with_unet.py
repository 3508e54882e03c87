"""Families with a UNet: every method and gradient mode, one test for each cell of the README's table."""

import pytest
from conformance.checks import check_family_cell, check_off_and_class, family_call, family_cells, method_of
from conformance.matrix import COLUMNS, WITH_UNET


@pytest.mark.parametrize(("family", "column"), family_cells(WITH_UNET))
def test_cell(family, column):
    check_family_cell(family, column)


@pytest.mark.parametrize("family", WITH_UNET)
def test_class_with_the_hook_equals_the_stock_class_when_off_and_returns_the_best_when_on(family):
    check_off_and_class(family)


def test_frozen_gradient_builds_no_graph_in_a_controlnet():
    call = family_call("controlnet_sdxl", 1)
    requires_grad: dict[str, list[bool]] = {"reno-frozen": [], "reno-full": []}
    for column, seen in requires_grad.items():
        handle = call.pipe.controlnet.conv_in.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(output.requires_grad)
        )
        call.optimize(method_of(COLUMNS[column], call.plain))
        handle.remove()
    frozen, full = requires_grad.values()
    assert len(frozen) == len(full)
    assert any(full)
    assert not any(frozen)
