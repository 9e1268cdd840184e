"""The moving average: what it is, in few launches, from weights of 16 bits too."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from engine.ema import update_average
from tools.benchmarks.operators import operators


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), *(nn.Linear(16, 16) for _ in range(40)))
    student[2].requires_grad_(False)
    average = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for values in [*student.parameters(), student[1].running_mean, student[1].running_var]:
            values.add_(torch.randn(values.shape))
    return student, average


def test_it_moves_by_the_definition_what_is_trained_and_the_statistics():
    for dtype in (torch.float32, torch.bfloat16):
        student, average = pair()
        student.to(dtype)
        before = copy.deepcopy(average)
        update_average(student, average, 0.9)
        assert all(parameter.dtype == torch.float32 for parameter in average.parameters())
        constant = {id(parameter) for parameter in average[2].parameters()}
        tensors = [[*module.parameters(), *module.buffers()] for module in (before, student, average)]
        for old, new, moved in zip(*tensors, strict=True):
            if id(moved) in constant or not moved.is_floating_point():
                assert torch.equal(moved, old)
            else:
                expected = 0.9 * old.double() + 0.1 * new.double()
                torch.testing.assert_close(moved.double(), expected, rtol=1e-6, atol=1e-6)
                assert not torch.equal(moved, old)


def test_it_takes_few_operators_however_many_tensors_there_are():
    """Two groups of parameters and the statistics, not four operators for each of 84 tensors."""
    for dtype, most in ((torch.float32, 3), (torch.bfloat16, 3 * 2 + 84)):  # beside the cast ones' memory
        student, average = pair()
        student.to(dtype)
        assert operators(partial(update_average, student, average, 0.9)).names.total() <= most
