"""The other ways of morphing (random sets, no protected token, exact counts, plain means, part of the tokens).

Each is held against an implementation in plain Python loops, written from its definition.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.morphing import (
    distance,
    exact_counts,
    group_tokens,
    morph,
    morphed_loss,
    normalize_channels,
    step_counts,
    unmorph,
)

# --- counts ---------------------------------------------------------------------------------------------------------


def cap(num_tokens: int, protect_first: bool) -> int:
    """What one step can remove of t tokens: one set into the other, and the first token in none."""
    return (num_tokens - 1) // 2 if protect_first else num_tokens // 2


def most_removable(num_steps: int, num_tokens: int, protect_first: bool) -> int:
    left = num_tokens
    for _ in range(num_steps):
        left -= cap(left, protect_first)
    return num_tokens - left


counted = given(st.integers(0, 400), st.integers(1, 20), st.integers(1, 400), st.booleans())


@settings(max_examples=300, deadline=None)
@counted
def test_exact_counts_remove_what_was_drawn_wherever_they_can(removed, num_steps, num_tokens, protect_first):
    removed = min(removed, num_tokens)
    taken = exact_counts(removed, num_steps, num_tokens, int(protect_first))
    assert len(taken) == num_steps and sum(taken) == min(removed, most_removable(num_steps, num_tokens, protect_first))
    left = num_tokens
    for count in taken:
        assert 0 <= count <= cap(left, protect_first)
        left -= count
    used = step_counts(removed, num_steps, num_tokens, counts="exact", protect_first=protect_first)
    assert used == [count for count in taken if count]


@settings(max_examples=300, deadline=None)
@counted
def test_exact_counts_differ_by_one_at_most_where_no_cap_binds(removed, num_steps, num_tokens, protect_first):
    """A step that could have taken one more token has at most one less than any other step."""
    taken = exact_counts(min(removed, num_tokens), num_steps, num_tokens, int(protect_first))
    left = num_tokens - sum(taken)
    for count in reversed(taken):
        room = count < left - protect_first  # of t tokens afterwards: one more would still be less than half
        assert not room or count >= max(taken) - 1
        left += count


@pytest.mark.parametrize("protect_first", [True, False])
def test_no_other_counts_are_more_even(protect_first):
    """All possible counts of few tokens: the sums of the smallest 1, 2, ... are never larger than ours."""
    for num_tokens, num_steps in itertools.product(range(1, 13), range(1, 5)):
        found: dict[int, list[tuple[int, ...]]] = {}
        for counts in itertools.product(range(num_tokens // 2 + 1), repeat=num_steps):
            left = num_tokens
            for count in counts:
                if count > cap(left, protect_first):
                    break
                left -= count
            else:
                found.setdefault(sum(counts), []).append(counts)
        assert max(found) == most_removable(num_steps, num_tokens, protect_first)
        for total, others in found.items():
            ours = exact_counts(total, num_steps, num_tokens, int(protect_first))
            assert tuple(ours) in others
            for other in others:
                pairs = zip(itertools.accumulate(sorted(ours)), itertools.accumulate(sorted(other)), strict=True)
                assert all(mine >= theirs for mine, theirs in pairs), (ours, other)


def test_exact_counts_by_hand():
    assert exact_counts(100, 7, 196, 1) == [15, 15, 14, 14, 14, 14, 14]
    assert exact_counts(196, 14, 196, 0)[-2:] == [2, 1] and sum(exact_counts(196, 14, 196, 0)) == 195  # one group
    assert exact_counts(196, 14, 196, 1)[-1] == 1 and sum(exact_counts(196, 14, 196, 1)) == 194  # and token 0
    assert exact_counts(196, 1, 196, 1) == [97] and exact_counts(196, 1, 196, 0) == [98]
    assert exact_counts(3, 7, 196, 1) == [1, 1, 1, 0, 0, 0, 0]


def test_released_counts_without_protection():
    """Half of the tokens may go in a step; else the released rule."""
    assert step_counts(196, 14, 196, counts="released", protect_first=True) == [14] * 12 + [13, 7]
    assert step_counts(196, 14, 196, counts="released", protect_first=False) == [14] * 13 + [7]
    assert step_counts(196, 1, 196, counts="released", protect_first=False) == [98]
    assert step_counts(0, 3, 196, counts="released", protect_first=False) == []


def test_a_single_group_is_the_mean_of_the_image():
    targets = torch.randn(2, 49, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = group_tokens(targets, 49, 6, counts="exact", protect_first=False)
    assert groups.sizes.tolist() == [[49.0], [49.0]] and (groups.labels == 0).all()
    torch.testing.assert_close(morph(targets, groups), targets.mean(dim=1, keepdim=True), rtol=1e-6, atol=1e-8)


# --- groups ---------------------------------------------------------------------------------------------------------


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def mean_of(originals: list[list[float]], weights: dict[int, float]) -> list[float]:
    return [sum(weight * originals[n][c] for n, weight in weights.items()) for c in range(len(originals[0]))]


def merge_step(
    current: list[dict[int, float]], originals: list, count: int, protect_first: bool, weighting: str, keys: list | None
) -> list[dict[int, float]]:
    """One step of the definition. A token is the weights of the original tokens in its mean, by their number."""
    order = list(range(len(current)))
    if keys is not None:
        free = order[1:] if protect_first else order
        order = [*(order[:1] if protect_first else []), *sorted(free, key=lambda place: (keys[place], place))]
    tokens = [current[place] for place in order]
    first_set, second_set = tokens[0::2], tokens[1::2]
    best = []
    for place, token in enumerate(first_set):
        if place or not protect_first:
            similar = [cosine(mean_of(originals, token), mean_of(originals, other)) for other in second_set]
            partner = max(range(len(second_set)), key=lambda other: (similar[other], -other))
            best.append((-similar[partner], place, partner))
    chosen = {place: partner for _, place, partner in sorted(best)[:count]}
    merged = []
    for number, token in enumerate(second_set):
        parts = [token, *(first_set[place] for place, partner in chosen.items() if partner == number)]
        if weighting == "size":
            members = [n for part in parts for n in part]
            merged.append({n: 1 / len(members) for n in members})
        else:
            merged.append({n: weight / len(parts) for part in parts for n, weight in part.items()})
    return [token for place, token in enumerate(first_set) if place not in chosen] + merged


def by_definition(originals: list, counts: list[int], protect_first: bool, weighting: str, keys: list | None) -> list:
    current = [{n: 1.0} for n in range(len(originals))]
    for number, count in enumerate(counts):
        step_keys = None if keys is None else keys[number][: len(current)]
        current = merge_step(current, originals, count, protect_first, weighting, step_keys)
    return current


ways = st.fixed_dictionaries(
    {
        "counts": st.sampled_from(["released", "exact"]),
        "protect_first": st.booleans(),
        "weighting": st.sampled_from(["size", "step"]),
    }
)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 14), st.integers(1, 5), st.data(), st.integers(0, 2**31), ways, st.booleans())
def test_groups_are_those_of_the_definition(num_tokens, num_steps, data, seed, way, at_random):
    removed = data.draw(st.integers(0, num_tokens))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(2, num_tokens, 5, generator=generator, dtype=torch.float64)
    keys = torch.randint(0, 2**32, (2, num_steps, num_tokens), generator=generator) if at_random else None
    groups = group_tokens(targets, removed, num_steps, keys=keys, **way)
    counts = step_counts(removed, num_steps, num_tokens, counts=way["counts"], protect_first=way["protect_first"])
    for row in range(2):
        row_keys = None if keys is None else keys[row].tolist()
        expected = by_definition(targets[row].tolist(), counts, way["protect_first"], way["weighting"], row_keys)
        labels = {n: label for label, token in enumerate(expected) for n in token}
        assert groups.labels[row].tolist() == [labels[n] for n in range(num_tokens)]
        assert groups.sizes[row].tolist() == [len(token) for token in expected]
        weights = torch.zeros(len(expected), num_tokens, dtype=torch.float64)
        for label, token in enumerate(expected):
            for n, weight in token.items():
                weights[label, n] = weight * len(token)
        torch.testing.assert_close(groups.weights[row], weights, rtol=1e-12, atol=1e-12)


def test_plain_means_decide_what_is_merged_next():
    """With few directions to point to, tokens of unequal means find other partners: other groups, not other weights."""
    targets = torch.randn(8, 24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_size, by_step = (group_tokens(targets, 20, 4, weighting=weighting) for weighting in ("size", "step"))
    for weighting, groups in (("size", by_size), ("step", by_step)):
        counts = step_counts(20, 4, 24, counts="released", protect_first=True)
        for row in range(8):
            expected = by_definition(targets[row].tolist(), counts, True, weighting, None)
            labels = {n: label for label, token in enumerate(expected) for n in token}
            assert groups.labels[row].tolist() == [labels[n] for n in range(24)]
    assert (by_size.labels != by_step.labels).any()


def test_step_weighting_halves_what_was_merged_before():
    """Three tokens on a line: two are merged first, and then stand for one token beside the third."""
    targets = torch.tensor([[[1.0, 0.0], [0.99, 0.14], [0.8, 0.6]]], dtype=torch.float64)
    way = dict(counts="exact", protect_first=False)
    by_size = group_tokens(targets, 2, 2, weighting="size", **way)
    by_step = group_tokens(targets, 2, 2, weighting="step", **way)
    assert by_size.sizes.tolist() == by_step.sizes.tolist() == [[3.0]]
    assert by_size.weights.tolist() == [[[1.0, 1.0, 1.0]]]
    assert sorted(by_step.weights.flatten().tolist()) == [0.75, 0.75, 1.5]
    expected = (by_step.weights[0] @ targets[0]) / 3
    torch.testing.assert_close(morph(targets, by_step)[0], expected, rtol=1e-6, atol=0)


def test_random_sets_differ_by_image_and_step_and_keep_the_protected_token():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(1, 40, 6, generator=generator).expand(4, -1, -1)  # four times the same image
    keys = torch.randint(0, 2**32, (4, 3, 40), generator=generator)
    groups = group_tokens(targets, 20, 3, keys=keys)
    partitions = {str((row[:, None] == row[None]).int().tolist()) for row in groups.labels}
    assert len(partitions) == 4
    assert (groups.labels[:, 0] == 0).all() and (groups.sizes[:, 0] == 1).all()
    free = group_tokens(targets, 20, 3, keys=keys, protect_first=False)
    assert (free.sizes.gather(1, free.labels[:, :1]) > 1).any()
    later = keys.clone()
    later[:, 2] = keys[:, 1]
    assert (group_tokens(targets, 20, 3, keys=later).labels != groups.labels).any()


# --- the tokens that count ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 4), st.data(), st.integers(0, 2**31), ways)
def test_a_part_of_the_tokens_is_a_part_of_the_unmorphed_form(num_tokens, num_steps, data, seed, way):
    """Every token gets its group's mean; the mean is over the chosen tokens of an image, then over images."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(3, num_tokens, 6, generator=generator, dtype=torch.float64)
    outputs = torch.randn(3, num_tokens, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    number = data.draw(st.integers(1, num_tokens))
    chosen = torch.rand(3, num_tokens, generator=generator).argsort(1) < number
    kind, normalize = data.draw(st.sampled_from(["smooth_l1", "l1", "l2", "negcosine"])), data.draw(st.booleans())
    groups = group_tokens(targets, data.draw(st.integers(0, num_tokens)), num_steps, **way)
    options = dict(kind=kind, beta=0.5, normalize_target=normalize)
    ours = morphed_loss(outputs, targets, groups, chosen=chosen, **options)
    spread, target_spread = (unmorph(morph(x, groups), groups) for x in (outputs, targets))
    target_spread = normalize_channels(target_spread) if normalize else target_spread
    by_token: Tensor = distance(spread, target_spread, kind, 0.5)
    theirs = torch.stack([row[counted].mean() for row, counted in zip(by_token, chosen, strict=True)]).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    gradients = (torch.autograd.grad(loss, outputs, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)
    whole = morphed_loss(outputs, targets, groups, **options)
    everything = torch.ones(3, num_tokens, dtype=torch.bool)
    torch.testing.assert_close(morphed_loss(outputs, targets, groups, chosen=everything, **options), whole)
