"""What DTM's objectives share: a frozen teacher's tokens, compared with the student's in groups of alike tokens.

The groups come from the teacher's tokens; how many tokens they merge and in how many steps is drawn anew for every 128
images of every step (arXiv 2401.00254).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.clustering import cluster_tokens
from engine.morphing import Groups, group_tokens, morphed_loss
from engine.objectives.contract import Objective
from engine.teachers import Teacher
from recipes.methods.morphing import Morphing
from shards.draws.philox import Stream, words


class Draw(NamedTuple):
    """One grouping: about so many tokens are removed, in so many steps."""

    removed: int
    num_steps: int


class MorphedComparison(Objective):
    """A subclass adds the student, calls `compare` with what it predicts, and sets what every objective must."""

    def __init__(self, settings: Morphing, *, teacher: Teacher, seed: int) -> None:
        super().__init__()
        self.settings, self.seed = settings, seed
        self.keep_outside("teacher", teacher, moves=False)

    @property
    def teacher(self) -> Teacher:
        return self.outside["teacher"]

    def facts(self) -> dict[str, str]:
        return {"teacher": self.teacher.identity}

    def compare(
        self, predictions: Tensor, targets: Tensor, positions: Tensor, step: int, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss of predictions against targets [B, N, T] and mean number of groups, in fp32.

        `positions` int64 [B] on the CPU are places in the global batch, from which everything is drawn: neither rank
        nor micro-batch changes what an image gives. `mask` bool [B, N], True = masked, is needed where
        objective.loss_on is not all. The number of groups counts the clusters that k-means emptied.
        """
        dtype = torch.promote_types(predictions.dtype, torch.float32)
        blocks = positions // self.settings.images_per_draw
        numbers, counts = (values.tolist() for values in blocks.unique_consecutive(return_counts=True))
        chosen = self.chosen_tokens(mask)
        loss, num_groups = torch.zeros((), dtype=dtype, device=predictions.device), 0.0
        with torch.autocast(predictions.device.type, enabled=False):
            parts = predictions.to(dtype).split(counts), targets.to(dtype).split(counts), positions.split(counts)
            chosen_parts = [None] * len(counts) if chosen is None else chosen.split(counts)
            for block, count, *part in zip(numbers, counts, *parts, chosen_parts, strict=True):
                block_loss, block_groups = self.compare_block(*part, block=block, step=step)
                loss = loss + block_loss * (count / len(blocks))
                num_groups += block_groups * (count / len(blocks))
        return {"loss": loss, "groups": torch.full_like(loss, num_groups, requires_grad=False)}

    def chosen_tokens(self, mask: Tensor | None) -> Tensor | None:
        """Which tokens [B, N] objective.loss_on names; None for all."""
        if self.settings.loss_on == "all":
            return None
        return mask if self.settings.loss_on == "masked" else ~mask

    def compare_block(
        self, predictions: Tensor, targets: Tensor, positions: Tensor, chosen: Tensor | None, *, block: int, step: int
    ) -> tuple[Tensor, float]:
        """Mean loss and mean number of groups over the groupings of images [b, N, T] that share them."""
        settings, losses, num_groups = self.settings, [], 0.0
        draws = self.draws(block, step, targets.shape[1])
        for schedule, draw in enumerate(draws):
            groups = self.group(targets, draw, positions, step, schedule)
            losses.append(
                morphed_loss(
                    predictions,
                    targets,
                    groups,
                    kind=settings.loss,
                    beta=settings.beta,
                    normalize_target=settings.normalize_target,
                    chosen=chosen,
                )
            )
            num_groups += groups.sizes.shape[1] / len(draws)
        return torch.stack(losses).mean(), num_groups

    def group(self, targets: Tensor, draw: Draw, positions: Tensor, step: int, schedule: int) -> Groups:
        """The groups of the tokens of `targets` [b, N, T] by one of the side by side drawn groupings."""
        settings, num_tokens = self.settings, targets.shape[1]
        if settings.morphing == "kmeans":
            keys = self.keys(Stream.CLUSTER, positions, step, start=schedule * num_tokens, count=num_tokens)
            return cluster_tokens(
                targets,
                max(1, num_tokens - draw.removed),
                num_iterations=settings.kmeans_iterations,
                keys=keys.to(targets.device),
            )
        keys = None
        if settings.split == "random":
            # Room for N steps of N tokens each, so that what is drawn depends on no other setting.
            start, count = schedule * num_tokens**2, draw.num_steps * num_tokens
            keys = self.keys(Stream.SPLIT, positions, step, start, count).to(targets.device)
            keys = keys.unflatten(1, (draw.num_steps, num_tokens))
        return group_tokens(
            targets,
            draw.removed,
            draw.num_steps,
            counts=settings.counts,
            protect_first=settings.protect_first,
            weighting=settings.weighting,
            keys=keys,
        )

    def keys(self, stream: Stream, positions: Tensor, step: int, start: int, count: int) -> Tensor:
        """Random numbers int64 [b, count]: functions of (seed, step, position) and of their own number from `start`."""
        return torch.from_numpy(words(self.seed, step, positions.numpy(), stream, count, start).astype(np.int64))

    def draws(self, block: int, step: int, num_tokens: int) -> list[Draw]:
        """The groupings of a block of the global batch: functions of (seed, step, block), uniform in their ranges."""
        settings, count = self.settings, self.settings.num_schedules
        drawn = words(self.seed, step, np.array([block]), Stream.MORPH, 2 * count)[0]
        most = num_tokens if settings.max_removed is None else settings.max_removed
        removed = scale(drawn[:count], settings.min_removed, most)
        steps = scale(drawn[count:], settings.min_steps, settings.max_steps)
        return [Draw(m, k) for m, k in zip(removed, steps, strict=True)]


def scale(drawn: np.ndarray, least: int, most: int) -> list[int]:
    """Random words uint32 as whole numbers in least ... most, all equally likely."""
    return [least + int(offset) for offset in drawn.astype(np.uint64) * np.uint64(most - least + 1) >> np.uint64(32)]
