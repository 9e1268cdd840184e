"""Values as pure functions of the step, so that a resume needs nothing but the step's number."""

from __future__ import annotations

import math


def warmup_cosine(
    step: float, *, peak: float, minimum: float, warmup: float, total: float, peak_within: bool = False
) -> float:
    """Linear from 0 to `peak` over `warmup`, then half a cosine to `minimum` at `total` (MAE, appendix A.1).

    `step`, `warmup` and `total` share one unit (steps, or epochs); `step` counts from 0, so the first step of a run
    with a warm-up has the value 0, as in the released programs. With `peak_within` the last step of the warm-up has
    the peak already (BEiT's program, and DTM's), otherwise the first step after it.
    """
    if step < warmup:
        return peak * min(1.0, step / max(warmup - 1, 1)) if peak_within else peak * step / warmup
    progress = (step - warmup) / (total - warmup) if total > warmup else 1.0
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
