"""Single operations of DALI on arrays, for tests: what a view does between decoding and normalising."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from images import smooth_picture
from nvidia.dali import fn, pipeline_def
from nvidia.dali.data_node import DataNode


def apply(
    operation: Callable[[DataNode, dict[str, DataNode]], DataNode],
    images: Sequence[np.ndarray],
    draws: dict[str, np.ndarray] | None = None,
) -> list[np.ndarray]:
    """`operation` on uint8 HWC images, each with its row of `draws`."""
    drawn = draws or {}

    @pipeline_def(enable_conditionals=True, batch_size=len(images), num_threads=1, device_id=None, exec_dynamic=True)
    def graph() -> DataNode:
        nodes = {name: fn.external_source(source=[list(rows)], cycle=True) for name, rows in drawn.items()}
        return operation(fn.external_source(source=[list(images)], cycle=True, layout="HWC"), nodes)

    pipeline = graph()
    pipeline.build()
    (out,) = pipeline.run()
    return [np.asarray(out.at(row)).copy() for row in range(len(images))]


def pictures(num: int, side: int = 64) -> list[np.ndarray]:
    """uint8 [side, side, 3]: smooth ones, and the same with grain, pale, dark, bright and gray."""
    found = []
    for seed in range(num):
        rng = np.random.default_rng(seed)
        smooth = np.asarray(smooth_picture(rng, side, side), np.float64)
        kinds = {
            0: smooth,
            1: smooth + rng.normal(0, 25, smooth.shape),
            2: 128 + (smooth - 128) / 4,
            3: smooth * 0.3,
            4: 120 + smooth * 0.7,
            5: smooth.mean(2, keepdims=True) + 3 * rng.integers(-1, 2, smooth.shape),
        }
        found.append(np.clip(kinds[seed % len(kinds)], 0, 255).astype(np.uint8))
    return found


def level_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> np.ndarray:
    """Mean absolute difference of each pair of images, in levels of 255."""
    return np.array([np.abs(a.astype(float) - b.astype(float)).mean() for a, b in zip(ours, theirs, strict=True)])
