"""How long calls take, on a GPU without waiting for it: by events in its stream."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


class Stopwatch:
    """Times of calls, by label."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def follow(self, owner: object, method: str, label: str) -> None:
        """From now on every call of `owner.method` is timed."""
        inner: Callable = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            began = self.now()
            try:
                return inner(*arguments, **options)
            finally:
                self.spans[label].append((began, self.now()))

        setattr(owner, method, timed)

    def now(self) -> Any:
        """An event in the GPU's stream, or the time."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def medians(self) -> dict[str, float]:
        """Seconds of a call, by label, of its later half: the first calls compile. Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return {label: median(map(self.seconds, spans[len(spans) // 2 :])) for label, spans in self.spans.items()}

    def seconds(self, span: tuple[Any, Any]) -> float:
        began, ended = span
        return began.elapsed_time(ended) / 1e3 if self.on_gpu else ended - began
