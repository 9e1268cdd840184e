"""What DTM's objectives share: a frozen teacher's tokens, compared with the student's in groups of alike tokens.

The groups come from the teacher's tokens; how many tokens they merge and in how many steps is drawn anew for every 128
images of every step (arXiv 2401.00254).

There are two ways to the same groups: block by block in shapes that the draw decides (morphing.py), and all images at
once in shapes that it does not (fixed_morphing.py), which a GPU gets where the settings have it. Draws are made on the
host and copied to the device without waiting for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.clustering import cluster_tokens
from engine.fixed_morphing import fixed_comparison, join_step, padded_counts
from engine.morphing import Groups, group_tokens, morphed_loss, step_counts
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

    fixed_shapes: bool | None = None  # which way to the groups; None: by device and settings

    def __init__(self, settings: Morphing, *, teacher: Teacher, seed: int) -> None:
        super().__init__()
        self.settings, self.seed = settings, seed
        self.join_step = join_step  # of fixed shapes; to be exchanged for what a compiler makes of it
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
        compare = self.compare_at_once if self.in_fixed_shapes(targets.device) else self.compare_blocks
        with torch.autocast(predictions.device.type, enabled=False):
            loss, num_groups = compare(
                predictions.to(dtype), targets.to(dtype), positions, self.chosen_tokens(mask), step
            )
        return {"loss": loss, "groups": num_groups}

    def in_fixed_shapes(self, device: torch.device) -> bool:
        """Whether groups are found in shapes that do not depend on the draw; ValueError where they must but cannot."""
        settings = self.settings
        possible = (settings.morphing, settings.split, settings.weighting) == ("bipartite", "parity", "size")
        if self.fixed_shapes and not possible:
            raise ValueError("fixed_shapes=true: needs morphing=bipartite, split=parity and weighting=size")
        return possible and device.type == "cuda" if self.fixed_shapes is None else self.fixed_shapes

    def chosen_tokens(self, mask: Tensor | None) -> Tensor | None:
        """Which tokens [B, N] objective.loss_on names; None for all."""
        if self.settings.loss_on == "all":
            return None
        return mask if self.settings.loss_on == "masked" else ~mask

    def compare_at_once(
        self, predictions: Tensor, targets: Tensor, positions: Tensor, chosen: Tensor | None, step: int
    ) -> tuple[Tensor, Tensor]:
        """Mean loss and mean number of groups over images [B, N, T] and their groupings, in fixed shapes."""
        settings = self.settings
        return fixed_comparison(
            predictions,
            targets,
            copied(self.counts(positions, step, targets.shape[1]), targets.device),
            chosen,
            protect_first=settings.protect_first,
            step=self.join_step,
            kind=settings.loss,
            beta=settings.beta,
            normalize_target=settings.normalize_target,
        )

    def counts(self, positions: Tensor, step: int, num_tokens: int) -> Tensor:
        """Tokens that every step of every image's groupings removes: int64 [max_steps, B, num_schedules], on the CPU.

        In a CUDA graph it is the only input that the host makes.
        """
        settings = self.settings
        blocks, images = (positions // settings.images_per_draw).unique_consecutive(return_counts=True)
        schedules = [
            step_counts(*draw, num_tokens, counts=settings.counts, protect_first=settings.protect_first)
            for block in blocks.tolist()
            for draw in self.draws(block, step, num_tokens)
        ]
        counts = padded_counts(schedules, settings.max_steps).unflatten(1, (len(blocks), settings.num_schedules))
        return counts.repeat_interleave(images, dim=1)

    def compare_blocks(
        self, predictions: Tensor, targets: Tensor, positions: Tensor, chosen: Tensor | None, step: int
    ) -> tuple[Tensor, Tensor]:
        """The same, of one block of images that share their draws after the other."""
        blocks = positions // self.settings.images_per_draw
        numbers, counts = (values.tolist() for values in blocks.unique_consecutive(return_counts=True))
        loss, num_groups = predictions.new_zeros(()), 0.0
        parts = predictions.split(counts), targets.split(counts), positions.split(counts)
        chosen_parts = [None] * len(counts) if chosen is None else chosen.split(counts)
        for block, count, *part in zip(numbers, counts, *parts, chosen_parts, strict=True):
            block_loss, block_groups = self.compare_block(*part, block=block, step=step)
            loss = loss + block_loss * (count / len(blocks))
            num_groups += block_groups * (count / len(blocks))
        return loss, torch.full_like(loss, num_groups, requires_grad=False)

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
                keys=copied(keys, targets.device),
            )
        keys = None
        if settings.split == "random":
            # Room for N steps of N tokens each, so that what is drawn depends on no other setting.
            start, count = schedule * num_tokens**2, draw.num_steps * num_tokens
            keys = copied(self.keys(Stream.SPLIT, positions, step, start, count), targets.device)
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


def copied(values: Tensor, device: torch.device) -> Tensor:
    """Values from the CPU on the device; to a GPU from pinned memory, so that the host goes on at once."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def scale(drawn: np.ndarray, least: int, most: int) -> list[int]:
    """Random words uint32 as whole numbers in least ... most, all equally likely."""
    return [least + int(offset) for offset in drawn.astype(np.uint64) * np.uint64(most - least + 1) >> np.uint64(32)]
