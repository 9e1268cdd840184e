"""LARS: matrices step in proportion to their length, vectors as in plain momentum SGD."""

from __future__ import annotations

import pytest
import torch

from engine.lars import Lars

# isort: split
from timm.optim import Lars as TimmLars


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def stepped(optimizer: torch.optim.Optimizer, num_steps: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for _ in range(num_steps):
        for parameter in found:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return [parameter.detach().clone() for parameter in found]


def test_without_decay_it_is_timms():
    (ours,) = stepped(Lars(parameters((4, 3)), 0.5, momentum=0.8, trust=0.01))
    (theirs,) = stepped(
        TimmLars(parameters((4, 3)), lr=0.5, momentum=0.8, trust_coeff=0.01, always_adapt=True, eps=0.0)
    )
    torch.testing.assert_close(ours, theirs)


def test_vectors_are_plain_sgd():
    (ours,) = stepped(Lars(parameters((5,)), 0.5, weight_decay=0.3))
    (theirs,) = stepped(torch.optim.SGD(parameters((5,)), lr=0.5, momentum=0.9))
    torch.testing.assert_close(ours, theirs)


def test_a_step_is_as_long_as_trust_times_the_matrix():
    """Whatever the gradient's length; the decay belongs to the gradient and changes the direction alone."""
    for weight_decay in (0.0, 0.3):
        before = parameters((4, 3))[0].detach()
        (after,) = stepped(Lars(parameters((4, 3)), 0.5, trust=0.01, weight_decay=weight_decay), num_steps=1)
        assert (after - before).norm().item() == pytest.approx(0.5 * 0.01 * before.norm().item())
    decayed, plain = (stepped(Lars(parameters((4, 3)), 0.5, weight_decay=wd), 1)[0] for wd in (0.3, 0.0))
    assert not torch.equal(decayed, plain)


def test_zeros_are_no_trouble():
    """A matrix of zeros takes the gradient as it is; without a gradient nothing moves."""
    zero, still, spared = torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2)
    tensors = [torch.nn.Parameter(values.clone()) for values in (zero, still, spared)]
    tensors[0].grad, tensors[1].grad = torch.ones(2, 2), torch.zeros(2, 2)
    Lars(tensors, 0.5).step()
    assert (tensors[0] == -0.5).all() and (tensors[1] == 1).all() and (tensors[2] == 1).all()


@pytest.mark.parametrize("name", ["lr", "momentum", "trust", "weight_decay"])
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=-1.0: must not be negative"):
        Lars(parameters((2, 2)), **{"lr": 0.1, name: -1.0})
