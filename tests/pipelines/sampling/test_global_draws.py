"""Draws from torch's global stream, and modes of torch that an interrupt has disturbed."""

import pytest
import torch
from torch.overrides import _len_torch_function_stack, _pop_mode  # pyright: ignore[reportPrivateImportUsage]

from noiseopt.pipelines.sampling.global_draws import GlobalDraws


def test_draws_without_a_generator_are_refused():
    with GlobalDraws("X", "Do Y."):
        torch.randn(2, generator=torch.Generator())
        with pytest.raises(ValueError, match=r"but X draws from torch's global stream.* Do Y\."):
            torch.randn(2)


def test_an_interrupt_that_left_a_mode_off_the_stack_stays_what_it_is():
    """Torch takes a mode off its stack while it runs a function under it."""
    with GlobalDraws("outer", ""):
        with pytest.raises(KeyboardInterrupt), GlobalDraws("inner", ""):
            _pop_mode()
            raise KeyboardInterrupt
        assert _len_torch_function_stack() == 1
    assert _len_torch_function_stack() == 0
