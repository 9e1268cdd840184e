"""Images of the GPU's graph, of the CPU's and of PIL on the same draws: whole views, and each operator alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tools.findings import Findings

if TYPE_CHECKING:
    import numpy as np
    import torch

    from recipes.schema import Data
    from shards.dataset import Dataset

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
NO_JITTER = dict.fromkeys(JITTER, 0.0)
PIL_LIMIT, PIL_LIMIT_COLOURS, DEVICE_LIMIT = 1.0, 2.0, 3.0  # mean difference, levels of 255


class Comparison:
    """Comparisons over all samples of a small data set, added to the findings."""

    def __init__(self, findings: Findings, dataset: Dataset, device: torch.device) -> None:
        self.findings, self.dataset, self.device = findings, dataset, device

    def view(self, view: str, data: Data) -> None:
        """A view as its recipe has it: the CPU's graph against PIL, and the GPU's against the CPU's."""
        import torch

        from shards.augment.parity import dali_images, mean_difference, pil_images

        ids, cpu = dali_images(self.dataset, view, data, torch.device("cpu"))
        pil = mean_difference(cpu, pil_images(self.dataset, view, data, ids))
        limit = PIL_LIMIT_COLOURS if view in ("pretrain_lut", "pretrain_dtm") else PIL_LIMIT
        self.findings.add(f"{view}: CPU graph and PIL", pil, "of 255", pil <= limit)
        if self.device.type == "cuda":
            difference = mean_difference(dali_images(self.dataset, view, data, self.device)[1], cpu)
            self.findings.add(f"{view}: mixed graph and CPU graph", difference, "of 255", difference <= DEVICE_LIMIT)

    def operators(self, mae: Data, lut: Data, dtm: Data) -> None:
        """Each operator alone, by the settings of the methods; the pictures' sides must be `image_size`.

        Then a crop of everything and a resize to the same size change nothing, and what differs is the operator's.
        """
        attempt = self.findings.attempt
        attempt("decoding", partial(self.operator, "decoding", "evaluate", replace(mae, eval_crop=1.0)))
        whole = replace(dtm, scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter_prob=1.0, **NO_JITTER)
        for name, strength in JITTER.items():
            attempt(name, partial(self.operator, name, "pretrain_dtm", replace(whole, **{name: strength})))
        attempt("effects", partial(self.effects, replace(lut, **NO_JITTER)))

    def operator(self, name: str, view: str, data: Data) -> None:
        """A view whose settings leave one operator to do."""
        _, ours, theirs = self.both_sides(view, data)
        self.add(name, ours, theirs)

    def effects(self, data: Data) -> None:
        """LUT's second image without jitter; which effect a sample got is drawn."""
        from shards.draws.augmentations import Effect, effects

        ids, (_, ours), (_, theirs) = self.both_sides("pretrain_lut", data)
        drawn = effects(0, 0, ids, data.blur_sigma)["effect"]
        for effect in Effect:
            self.add(effect.name.lower(), [ours[drawn == effect]], [theirs[drawn == effect]])

    def both_sides(self, view: str, data: Data) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Ids, and images on the device and on the CPU; or on the CPU and by PIL, where there is no other device."""
        import torch

        from shards.augment.parity import dali_images, pil_images

        ids, ours = dali_images(self.dataset, view, data, self.device)
        if self.device.type == "cuda":
            return ids, ours, dali_images(self.dataset, view, data, torch.device("cpu"))[1]
        return ids, ours, pil_images(self.dataset, view, data, ids)

    def add(self, name: str, ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
        from shards.augment.parity import mean_difference

        difference, cuda = mean_difference(ours, theirs), self.device.type == "cuda"
        limit, sides = (DEVICE_LIMIT, "device and CPU") if cuda else (PIL_LIMIT_COLOURS, "CPU and PIL")
        self.findings.add(f"{name} alone: {sides}", difference, "of 255", difference <= limit)
