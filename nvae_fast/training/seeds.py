"""Seeds that depend only on what they are for, so that a resumed run draws the noise it would have drawn."""

from __future__ import annotations

import operator

from nvae_fast.data.hashing import splitmix64

# One constant per purpose keeps, say, the noise of step 5 apart from the order of epoch 5.
NOISE = 1
DATA = 2
SAMPLES = 3
EVALUATION = 4


def mix_seed(*parts: int) -> int:
    """A seed in [0, 2^63) from any number of integers, by the splitmix64 finaliser: `h = mix(h ^ mix(part))`.

    Neighbouring inputs (step 5, step 6) give unrelated outputs; the order of the parts matters.
    """
    state = 0x6A09E667F3BCC908
    for part in parts:
        state = splitmix64(state ^ splitmix64(operator.index(part)))
    return state >> 1
