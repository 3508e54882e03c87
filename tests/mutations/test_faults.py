"""Each fault can be planted, and the runner tells found ones from those that survive."""

import ast

import pytest
from mutations.faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_fault_can_be_planted(fault):
    assert ast.dump(ast.parse(fault.mutated())) != ast.dump(ast.parse(fault.mutated().replace(fault.new, fault.old)))
    assert fault.nearest_tests()


def test_names_are_unique():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
