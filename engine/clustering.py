"""k-means of the tokens of each image, the paper's other way of finding groups for token morphing (DTM).

Tokens are points of the unit sphere, as cosine similarity sees them. Pure tensor functions of a batch; like morphing
they add in the same order every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.morphing import Groups, group_sizes


@torch.no_grad()
def cluster_tokens(targets: Tensor, num_clusters: int, *, num_iterations: int, keys: Tensor) -> Groups:
    """Partition the tokens of `targets` [B, N, T] into at most `num_clusters` groups by Lloyd's algorithm.

    The first centres are distinct tokens, those with the smallest `keys` int64 [B, N] (random numbers; of equal ones
    the lower place). `num_iterations` times every token is given to its nearest centre, of equally near ones to the
    first; in between each centre moves to the direction of the sum of its tokens. A cluster that lost all its tokens
    stays empty: size 0, and no weight in any loss.
    """
    points = directions(targets)
    first = keys.argsort(dim=1, stable=True)[:, :num_clusters]
    centres = points.gather(1, first[..., None].expand(-1, -1, points.shape[-1]))  # [B, G, T]
    groups = nearest_centres(points, centres, torch.ones_like(first, dtype=torch.bool))
    for _ in range(num_iterations - 1):
        groups = nearest_centres(points, directions(groups.sums(points)), groups.sizes > 0)
    return groups


def nearest_centres(points: Tensor, centres: Tensor, alive: Tensor) -> Groups:
    """The points [B, N, T] in groups by the centre [B, G, T], of those `alive` [B, G], that each is nearest to.

    All have length 1, so that the nearest is the most similar.
    """
    similarity = (points @ centres.mT).masked_fill(~alive[:, None], -torch.inf)  # [B, N, G]
    labels = similarity.argmax(dim=-1)  # the first maximum
    return Groups(labels, group_sizes(labels, centres.shape[1], points.dtype))


def directions(vectors: Tensor) -> Tensor:
    """Vectors [..., T] at length 1; one of zeros stays as it is."""
    return F.normalize(vectors, dim=-1, eps=torch.finfo(vectors.dtype).tiny)
