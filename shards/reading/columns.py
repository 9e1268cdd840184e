"""Columns from us as nodes of a DALI graph: one array per column, one row per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode

Row = tuple[np.ndarray, ...]

_TYPES = {
    "int32": types.INT32, "int64": types.INT64, "float32": types.FLOAT, "bool": types.BOOL, "uint8": types.UINT8,
}  # fmt: skip


def column_nodes(example: dict[str, np.ndarray], source: Iterator[Row] | Callable[[], Row]) -> dict[str, DataNode]:
    """A node for each column of `example`, whose batches `source` gives in the same order."""
    nodes = fn.external_source(
        source=source,
        num_outputs=len(example),
        batch=True,
        dtype=[_TYPES[column.dtype.name] for column in example.values()],
        ndim=[column.ndim - 1 for column in example.values()],
    )
    return dict(zip(example, nodes))  # noqa: B905 (DALI's rewritten zip has no `strict`; num_outputs says the same)
