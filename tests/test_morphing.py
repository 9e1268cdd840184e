"""Token morphing: the properties of a partition and of the loss over it. Its numbers: test_golden.py."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.morphing import (
    Groups,
    distance,
    group_sizes,
    group_sums,
    group_tokens,
    membership_of,
    merge_places,
    morph,
    morphed_loss,
    normalize_channels,
    removed_per_step,
    unmorph,
)

KINDS = ("smooth_l1", "l1", "l2", "negcosine")


precisions = st.sampled_from([torch.float32, torch.float64])
partitions = given(st.integers(1, 30), st.integers(1, 5), st.data(), st.integers(0, 2**31), precisions)


@settings(max_examples=60, deadline=None)
@partitions
def test_groups_are_a_partition(num_tokens, steps, data, seed, dtype):
    removed = data.draw(st.integers(0, num_tokens))
    targets = torch.randn(3, num_tokens, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    groups = group_tokens(targets, removed, steps)
    num_groups = groups.sizes.shape[1]
    assert groups.membership.dtype == groups.sizes.dtype == dtype
    assert (groups.membership.sum(1) == 1).all() and (groups.membership.sum(2) == groups.sizes).all()
    assert (groups.membership == membership_of(groups.labels, num_groups, dtype)).all()
    assert (groups.sizes >= 1).all() and (groups.sizes.sum(1) == num_tokens).all()
    assert (groups.labels[:, 0] == 0).all() and (groups.sizes[:, 0] == 1).all()  # token 0 is alone, and first
    left = num_tokens
    for _ in range(steps):  # a step never removes half of the tokens it finds
        left -= min(removed_per_step(removed, steps, num_tokens), (left - 1) // 2)
    assert num_groups == left


@settings(max_examples=30, deadline=None)
@partitions
def test_loss_over_groups_is_the_loss_over_tokens(num_tokens, steps, data, seed, _):
    """The equality that performance.md proves, with gradients, for every distance."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(2, num_tokens, 6, generator=generator, dtype=torch.float64)
    outputs = torch.randn(2, num_tokens, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    kind, normalize = data.draw(st.sampled_from(KINDS)), data.draw(st.booleans())
    groups = group_tokens(targets, data.draw(st.integers(0, num_tokens)), steps)
    by_group = morphed_loss(outputs, targets, groups, kind=kind, beta=2.0, normalize_target=normalize)
    by_token = token_loss(outputs, targets, groups, kind, normalize)
    torch.testing.assert_close(by_group, by_token, rtol=1e-13, atol=1e-15)
    ours, theirs = (torch.autograd.grad(loss, outputs, retain_graph=True)[0] for loss in (by_group, by_token))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


def token_loss(outputs: Tensor, targets: Tensor, groups: Groups, kind: str, normalize: bool) -> Tensor:
    """The paper's form: every token receives its group's mean, then all tokens are compared."""
    spread, target_spread = (unmorph(morph(x, groups), groups) for x in (outputs, targets))
    if normalize:
        target_spread = normalize_channels(target_spread)
    return distance(spread, target_spread, kind, 2.0).mean()


def test_images_do_not_depend_on_each_other():
    targets = torch.randn(5, 49, 8, generator=torch.Generator().manual_seed(0))
    together, order = group_tokens(targets, 30, 4).labels, torch.tensor([3, 0, 4, 2, 1])
    assert (group_tokens(targets[order], 30, 4).labels == together[order]).all()
    for row in range(5):
        assert (group_tokens(targets[row : row + 1], 30, 4).labels == together[row]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**31), precisions)
def test_sums_are_products_with_the_membership(num_rows, num_groups, seed, dtype):
    """Added row by row on the CPU, as one product elsewhere: the same, with gradients, and the same bits each time."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_groups, (3, num_rows), generator=generator)
    values = torch.randn(3, num_rows, 4, generator=generator).to(dtype).requires_grad_()
    factors = torch.randn(3, num_groups, 4, generator=generator).to(dtype)
    sums, membership = group_sums(values, labels, num_groups), membership_of(labels, num_groups, dtype)
    torch.testing.assert_close(sums, membership @ values)
    (gradient,) = torch.autograd.grad(sums, values, factors)
    torch.testing.assert_close(gradient, membership.mT @ factors)
    assert torch.equal(group_sums(values, labels, num_groups), sums)
    assert torch.equal(group_sizes(labels, num_groups, dtype), membership.sum(dim=2))
    assert group_sums(values.detach().to("meta"), labels.to("meta"), num_groups).shape == sums.shape


def test_the_length_of_a_token_does_not_matter_for_one_step():
    targets = torch.randn(2, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = targets * torch.tensor([2.0, 0.5]).repeat(10)[:, None]  # powers of two: exact
    assert (group_tokens(scaled, 7, 1).labels == group_tokens(targets, 7, 1).labels).all()


def test_ties_go_to_the_lower_place():
    """All tokens alike: the first even tokens after token 0 join the first odd one."""
    places = merge_places(torch.ones(2, 8, 8), 2)
    kept, odd = [0, 1], [2, 3, 4, 5]  # of the even places 0 2 4 6, places 2 and 4 are merged
    assert places.tolist() == [[kept[0], odd[0], odd[0], odd[1], odd[0], odd[2], kept[1], odd[3]]] * 2
    long = merge_places(torch.ones(1, 196, 196), 40)[0]  # long enough for an unstable sort to show
    assert (long[2:81:2] == 58).all() and (long[82::2] == torch.arange(1, 58)).all() and long[0] == 0


def test_a_token_of_zeros_is_like_no_other():
    """No division by zero: its similarity is 0 to all, and the others are grouped as ever."""
    targets = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(0)).abs()
    targets[0, 4] = 0
    groups = group_tokens(targets, 3, 1)
    assert groups.sizes.sum() == 10 and groups.sizes[0, groups.labels[0, 4]] == 1


def test_targets_receive_no_gradient_through_the_groups():
    targets = torch.randn(2, 9, 4, requires_grad=True)
    groups = group_tokens(targets, 4, 2)
    assert not groups.membership.requires_grad and not groups.sizes.requires_grad
