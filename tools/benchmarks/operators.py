"""Operators as torch dispatches them: how many launches a step is, whatever the machine and its load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Computing nothing, or (detach, alias) no more than another name of the same memory, as views are.
FREE = {"aten.detach", "aten.alias", "aten.lift_fresh", "aten._unsafe_view", "aten._reshape_alias"}
# What makes the host wait for the device: numbers read from it, and shapes that depend on its values.
WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_consecutive"}


class OperatorCount(TorchDispatchMode):
    """Counts operators while it is entered, forward and backward, by the name of their packet ("aten.add")."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name.startswith("aten.") and not func.is_view and name not in FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waiting(self) -> dict[str, int]:
        """Those after which the host has waited for the device."""
        return {name: count for name, count in self.names.items() if name in WAITING}


def operators(work: Callable[[], object]) -> OperatorCount:
    """What `work` dispatches."""
    with OperatorCount() as count, torch.autograd.set_multithreading_enabled(False):
        work()
    return count
