"""Import timm on any build of torch.

timm imports torchvision, and torchvision from PyPI (a CUDA build) does not import beside a CPU build of torch: it
registers meta kernels for operators, `nms` and `qnms`, that its own binary should have declared and could not. When
that import fails in just this way, the two schemas are declared here and the import is tried once more. With a
matching pair nothing is done. (pytorch/vision #9085, pytorch #122494.)
"""

from __future__ import annotations

import sys

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library takes its schemas back when it is collected


def import_torchvision() -> None:
    """Import torchvision, declaring its missing operators where the pair of builds does not match."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        _declared.append(library)
        import torchvision  # noqa: F401


import_torchvision()
