"""How much memory a piece of work holds at most, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler tells the terminal of every start and stop

from torch.profiler import ProfilerActivity, profile


def peak_megabytes(work: Callable[[], object]) -> float:
    """Most megabytes of tensors that `work` holds at once, beyond those that there were before.

    From torch's record of every allocation on the CPU, in the order of time: what kernels take for themselves is in
    it, what the libraries under them take from the system is not.
    """
    work()  # what is made once and kept does not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0)) / 1e6
