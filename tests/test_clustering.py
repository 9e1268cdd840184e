"""k-means of tokens against plain Python loops, and its edge cases: ties, emptied clusters, one cluster, N clusters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.clustering import cluster_tokens
from engine.morphing import morph, morphed_loss


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def by_definition(tokens: list[list[float]], num_clusters: int, num_iterations: int, keys: list[int]) -> list[int]:
    """Lloyd's algorithm on the unit sphere, from the tokens with the smallest keys: the cluster of every token."""
    points = [unit(token) for token in tokens]
    first = sorted(range(len(points)), key=lambda n: (keys[n], n))[:num_clusters]
    centres = {cluster: points[n] for cluster, n in enumerate(first)}
    labels: list[int] = []
    for _ in range(num_iterations):
        if labels:
            members = {c: [p for p, label in zip(points, labels, strict=True) if label == c] for c in set(labels)}
            centres = {c: unit([sum(column) for column in zip(*own, strict=True)]) for c, own in members.items()}
        labels = [min(centres, key=lambda c: (squared_distance(point, centres[c]), c)) for point in points]
    return labels


def squared_distance(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 14), st.integers(1, 8), st.data(), st.integers(0, 2**31))
def test_clusters_are_those_of_the_definition(num_tokens, num_iterations, data, seed):
    num_clusters = data.draw(st.integers(1, num_tokens))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(2, num_tokens, 4, generator=generator, dtype=torch.float64)
    keys = torch.randint(0, 2**32, (2, num_tokens), generator=generator)
    groups = cluster_tokens(targets, num_clusters, num_iterations=num_iterations, keys=keys)
    for row in range(2):
        expected = by_definition(targets[row].tolist(), num_clusters, num_iterations, keys[row].tolist())
        assert groups.labels[row].tolist() == expected
        assert groups.sizes[row].tolist() == [expected.count(cluster) for cluster in range(num_clusters)]
    assert (groups.membership.sum(1) == 1).all() and (groups.membership.sum(2) == groups.sizes).all()
    assert (groups.weights == groups.membership).all() and groups.membership.shape == (2, num_clusters, num_tokens)


def test_iterations_bring_tokens_nearer_to_their_centres():
    targets = torch.randn(4, 60, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = torch.randint(0, 2**32, (4, 60), generator=torch.Generator().manual_seed(1))
    points, likenesses = torch.nn.functional.normalize(targets, dim=-1), []
    for num_iterations in (1, 2, 3, 30):
        groups = cluster_tokens(targets, 7, num_iterations=num_iterations, keys=keys)
        likenesses.append((groups.membership @ points).norm(dim=-1).sum().item())  # of all tokens to their centres
    assert likenesses == sorted(set(likenesses))
    settled = [cluster_tokens(targets, 7, num_iterations=n, keys=keys).labels for n in (60, 61)]
    assert torch.equal(*settled)


def test_one_cluster_is_the_image_and_n_clusters_are_its_tokens():
    targets = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(12).flip(0).expand(2, -1)
    whole = cluster_tokens(targets, 1, num_iterations=10, keys=keys)
    torch.testing.assert_close(morph(targets, whole), targets.mean(1, keepdim=True), rtol=1e-5, atol=1e-6)
    alone = cluster_tokens(targets, 12, num_iterations=10, keys=keys)
    assert (alone.labels == torch.arange(12).flip(0)).all()  # token n began cluster 11 - n


def test_ties_go_to_the_first_cluster_and_equal_keys_to_the_lower_place():
    groups = cluster_tokens(torch.ones(2, 6, 3), 4, num_iterations=5, keys=torch.zeros(2, 6, dtype=torch.int64))
    assert (groups.labels == 0).all() and groups.sizes.tolist() == [[6.0, 0.0, 0.0, 0.0]] * 2
    corners = torch.eye(3).repeat(1, 2, 1)  # tokens 0 1 2 and the same again
    first = cluster_tokens(corners, 3, num_iterations=1, keys=torch.zeros(1, 6, dtype=torch.int64))
    assert first.labels.tolist() == [[0, 1, 2, 0, 1, 2]]


def test_a_cluster_without_tokens_stays_empty():
    """The second cluster loses its only token at once (its twin comes first), and wins none later."""
    angles = torch.tensor([0.0, 0.0, 0.4, 2.0, 2.1], dtype=torch.float64)
    targets = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    keys = torch.tensor([[0, 1, 4, 2, 3]])  # the clusters begin with tokens 0, 1, 3, 4
    for num_iterations in (1, 2, 10):  # the first centre moves to 0.133, away from where the second one began
        groups = cluster_tokens(targets, 4, num_iterations=num_iterations, keys=keys)
        assert groups.labels.tolist() == [[0, 0, 0, 2, 3]] and groups.sizes.tolist() == [[3.0, 0.0, 1.0, 1.0]]
    # Not even the last token, whose cosine to the only centre left is negative, as if the empty one's were 0.
    angles = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 2.5], dtype=torch.float64)
    targets = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    groups = cluster_tokens(targets, 2, num_iterations=5, keys=torch.arange(6)[None])
    assert groups.labels.tolist() == [[0] * 6]


@pytest.mark.parametrize("normalize_target", [False, True])
@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "l2", "negcosine"])
def test_empty_clusters_do_no_harm(kind, normalize_target):
    """Their weight is 0: loss and gradient are finite, and those of the clusters that have tokens alone."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)[:, [0, 0, 0, 1, 1, 2]]
    outputs = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    keys = torch.arange(6).expand(2, -1)
    losses, gradients = [], []
    for kept in ([0, 1, 2, 3, 4, 5], [0, 3, 5]):  # all six clusters; those with tokens alone
        groups = cluster_tokens(targets, 6, num_iterations=3, keys=keys)
        assert (groups.sizes == torch.tensor([3.0, 0, 0, 2, 0, 1])).all()
        labels = torch.searchsorted(torch.tensor(kept), groups.labels)
        groups = groups._replace(labels=labels, sizes=groups.sizes[:, kept])
        student = outputs.clone().requires_grad_()
        loss = morphed_loss(student, targets, groups, kind=kind, beta=2.0, normalize_target=normalize_target)
        chosen = torch.tensor([True, False, True, True, False, False]).expand(2, -1)
        options = dict(kind=kind, beta=2.0, normalize_target=normalize_target, chosen=chosen)
        (loss + morphed_loss(student, targets, groups, **options)).backward()
        losses.append(loss.detach())
        gradients.append(student.grad)
    assert losses[0].isfinite() and gradients[0].isfinite().all() and gradients[0].abs().sum() > 0
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_images_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(0)
    targets, keys = torch.randn(5, 49, 8, generator=generator), torch.randint(0, 2**32, (5, 49), generator=generator)
    together = cluster_tokens(targets, 9, num_iterations=10, keys=keys).labels
    for row in range(5):
        part = slice(row, row + 1)
        assert (cluster_tokens(targets[part], 9, num_iterations=10, keys=keys[part]).labels == together[part]).all()
    other = cluster_tokens(targets, 9, num_iterations=10, keys=keys.flip(1)).labels
    assert (other != together).any()


def test_targets_receive_no_gradient_through_the_clusters():
    targets = torch.randn(2, 9, 4, requires_grad=True)
    groups = cluster_tokens(targets, 4, num_iterations=3, keys=torch.arange(9).expand(2, -1))
    assert not groups.membership.requires_grad and not groups.sizes.requires_grad
