"""Where a run stands, and the learning rate there. Pure functions: resuming needs no scheduler state.

Schedules follow the *position* of a run. Without a time limit it is the step number, exactly. With a time
limit that is too short for all steps the position moves on by more than one per step, such that learning rate
and KL coefficient still reach the end of their schedules when the time is over.
"""

from __future__ import annotations

import math


def learning_rate(
    position: float, total_steps: float, *, peak: float, minimum: float, warmup_steps: float = 0
) -> float:
    """Linear warm-up, then half a cosine down to the minimum.

        position < warmup:  peak * (position + 1) / warmup
        after:              minimum + (peak - minimum) * (1 + cos(pi * t)) / 2,   t from 0 to 1

    position: 0 for the first step, total_steps - 1 for the last (which gets the minimum). peak, minimum: the largest rate and
    the last. warmup_steps: length of the warm-up. Lengths in steps. Raises ValueError when total_steps is not positive.
    """
    if total_steps <= 0:
        raise ValueError(f"learning_rate: total_steps must be positive, got {total_steps}")
    if warmup_steps > 0 and position < warmup_steps:
        return peak * min((position + 1) / warmup_steps, 1.0)
    span = max(total_steps - 1 - warmup_steps, 1)
    t = min(max((position - warmup_steps) / span, 0.0), 1.0)
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * t))


def advance(
    position: float, total_steps: float, *, elapsed: float, last: float, limit: float | None
) -> float:
    """The position after one more step.

    elapsed: seconds of training so far; last: seconds a step takes now; limit: seconds allowed, None for no
    limit. The result is `position + 1` whenever the remaining steps fit into the remaining time, so that a
    time limit which is long enough changes nothing, bit for bit.
    """
    if limit is None:
        return position + 1
    affordable = max((limit - elapsed) / max(last, 1e-9), 1.0)
    return position + max(1.0, (total_steps - position - 1) / affordable)
