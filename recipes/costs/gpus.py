"""GPUs that are known: what a plan is made for, and what MFU is a share of."""

from __future__ import annotations

from dataclasses import dataclass

GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """TFLOP/s are dense bf16, GB are 10^9 bytes."""

    title: str
    peak: float  # TFLOP/s that the vendor names
    attainable: float  # TFLOP/s of a large matrix product
    memory: float  # GB
    inside_node: float  # GB/s that a GPU sends in a ring of one node
    between_nodes: float  # GB/s that a GPU sends in a ring of several nodes
    source: str  # of `attainable`


GPUS = {
    "h200": Gpu(
        title="H200 SXM", peak=989, attainable=790, memory=141, inside_node=360, between_nodes=40,
        source="measured, 8192 x 8192 matrices",
    ),
    "h100": Gpu(
        title="H100 SXM", peak=989, attainable=790, memory=80, inside_node=360, between_nodes=40,
        source="as the H200, whose chip it has",
    ),
    "a100": Gpu(
        title="A100 SXM 80 GB", peak=312, attainable=250, memory=80, inside_node=240, between_nodes=20,
        source="assumed: the H200's share of its peak",
    ),
}  # fmt: skip
OTHER_CARDS = ("PCIE", "NVL", "GH200", "MIG")  # of the same names, with other peaks; MIG: a part of one


def known_gpu(device_name: str) -> Gpu | None:
    """The GPU that CUDA calls so ("NVIDIA H100 80GB HBM3"); None for another."""
    name = device_name.upper()
    if any(other in name for other in OTHER_CARDS):
        return None
    return next((gpu for key, gpu in GPUS.items() if key.upper() in name), None)
