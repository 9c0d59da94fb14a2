"""Seeds that depend only on what they are for, so that a resumed run draws the noise it would have drawn."""

from __future__ import annotations

_MASK = (1 << 64) - 1

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
        state = _finalise((state ^ _finalise(part & _MASK)) & _MASK)
    return state >> 1


def _finalise(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
