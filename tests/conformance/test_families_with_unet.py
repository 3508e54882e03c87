"""Every family with a UNet with every method and gradient route: a cell of the README's table each."""

import pytest
from conformance.checks import check_family_cell, check_off_and_class, family_call, method_of
from conformance.matrix import COLUMNS, WITH_UNET


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("family", WITH_UNET)
def test_cell(family, column):
    check_family_cell(family, column)


@pytest.mark.parametrize("family", WITH_UNET)
def test_a_class_with_the_hook_is_bit_identical_when_off_and_draws_the_best_when_on(family):
    check_off_and_class(family)


def test_the_frozen_route_keeps_no_graph_in_a_controlnet():
    call, graphs = family_call("controlnet_sdxl", 1), []
    net = call.pipe.controlnet
    handle = net.conv_in.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad))
    for column in ("reno-frozen", "reno-full"):
        call.optimize(method_of(COLUMNS[column], call.plain))
        graphs.append(column)
    handle.remove()
    frozen, full = (graphs[: graphs.index("reno-frozen")], graphs[graphs.index("reno-frozen") + 1 : -1])
    assert len(frozen) == len(full) and not any(frozen) and any(full)
