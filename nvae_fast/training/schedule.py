"""Position of a run in its schedules, and the learning rate. These are pure functions, so there is no scheduler state.

Schedules are functions of the *position* of a run. Without a time limit the position is the step number. With a
time limit that is too short for all steps it advances by more than one per step, so that learning rate and KL
coefficient reach the end of their schedules when the time is over.
"""

from __future__ import annotations

import math


def learning_rate(
    position: float, total_steps: float, *, peak: float, minimum: float, warmup_steps: float = 0
) -> float:
    """Learning rate of a linear warm-up followed by half a cosine down to the minimum.

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

    elapsed: seconds of training so far; last: current seconds per step; limit: seconds allowed, None for no
    limit. The result is exactly `position + 1` when the remaining steps fit into the remaining time.
    """
    if limit is None:
        return position + 1
    affordable = max((limit - elapsed) / max(last, 1e-9), 1.0)
    return position + max(1.0, (total_steps - position - 1) / affordable)
