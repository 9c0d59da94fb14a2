"""The noise of the C++ kernels as a random variable: moments, tails, Kolmogorov-Smirnov, independence, on 1e8 draws.

Thresholds are five standard errors of the statistic under the null hypothesis (one failure in about two million runs), with
fixed seeds, so that a failure means a broken generator.
"""

from __future__ import annotations

import math

import torch
from internals import needs_extension

import nvae_fast as nf

DRAWS = 100_000_000
CHUNK = 10_000_000
BINS = 4096

pytestmark = needs_extension


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.erfc(-x.double() / math.sqrt(2))


def draws(seed: int) -> torch.Tensor:
    """One chunk of the stream; ten sub-streams of 1e7 make the 1e8."""
    return nf.philox_normal((CHUNK,), seed)


def test_a_hundred_million_draws() -> None:
    moments = torch.zeros(4, dtype=torch.float64)
    counts = torch.zeros(BINS, dtype=torch.float64)
    tails = torch.zeros(3, dtype=torch.float64)
    neighbours = torch.zeros(4, dtype=torch.float64)  # lag 1 to 4: within and across blocks
    squares = torch.zeros(4, dtype=torch.float64)
    across = 0.0
    previous = None
    for seed in range(DRAWS // CHUNK):
        z = draws(seed)
        powers = [
            z.double().sum(),
            (z * z).double().sum(),
            (z * z * z).double().sum(),
            (z.square().square()).double().sum(),
        ]
        moments += torch.stack(powers)
        counts += torch.histc(z, BINS, -4.0, 4.0).double()
        tails += torch.stack([(z.abs() > t).sum() for t in (4.0, 4.5, 5.0)]).double()
        energy = z.square() - 1.0
        for lag in range(1, 5):
            neighbours[lag - 1] += torch.dot(z[:-lag], z[lag:]).double()
            squares[lag - 1] += torch.dot(energy[:-lag], energy[lag:]).double() / 2.0
        if previous is not None:
            across += float(torch.dot(previous, z))
        previous = z
    n = float(DRAWS)
    expected = torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    spread = torch.tensor([1.0, 2.0, 15.0, 96.0], dtype=torch.float64).sqrt() / math.sqrt(n)
    assert ((moments / n - expected).abs() < 5 * spread).all(), moments / n
    for count, threshold in zip(tails.tolist(), (4.0, 4.5, 5.0), strict=True):
        mean = n * math.erfc(threshold / math.sqrt(2))
        assert abs(count - mean) < 5 * math.sqrt(mean) + 1, f"{count} beyond {threshold}, expected {mean:.0f}"
    # Kolmogorov-Smirnov at the bin edges: the distance of the two distribution functions, inside [-4, 4].
    edges = torch.linspace(-4.0, 4.0, BINS + 1, dtype=torch.float64)
    below = n * float(normal_cdf(edges[:1]))
    distance = ((below + counts.cumsum(0)) / n - normal_cdf(edges[1:])).abs().max()
    assert float(distance) < 2.6 / math.sqrt(n), float(distance)
    # Chi-squared of the bins, and of independence (lagged products of draws and of their squares).
    mean = n * (normal_cdf(edges[1:]) - normal_cdf(edges[:-1]))
    chi = float(((counts - mean).square() / mean).sum())
    assert abs(chi - BINS) < 5 * math.sqrt(2 * BINS), chi
    assert (neighbours.abs() < 5 * math.sqrt(n)).all(), neighbours
    assert (squares.abs() < 5 * math.sqrt(n)).all(), squares
    assert abs(across) < 5 * math.sqrt(n), across


def test_neighbouring_seeds_and_groups_are_independent() -> None:
    n = 1_000_000
    for base in (0, 1, 2**32 - 1, 2**63 - 2):
        first, second = nf.philox_normal((n,), base), nf.philox_normal((n,), base + 1)
        assert abs(float(torch.dot(first, second))) < 5 * math.sqrt(n)
    from nvae_fast.ops.philox import split_seed

    streams = [nf.philox_normal((n,), s) for s in split_seed(7, 4)]
    streams.append(nf.philox_normal((n,), 7))
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(float(torch.dot(a, b))) < 5 * math.sqrt(n)


def test_the_kernel_draws_that_stream() -> None:
    """What residual_normal draws inside is the same stream: its statistics are those above."""
    z = nf.residual_normal(torch.zeros(64, 40, 32, 32), seed=5, clamp=None, sigma_floor=0.0).z
    assert torch.equal(z, nf.philox_normal(z.shape, 5))
