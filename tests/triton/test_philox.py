"""The Triton kernels of the Philox generator: the same words as the reference, normals to 1e-6."""

from __future__ import annotations

import pytest
import torch
from exact_normals import TOLERANCE, exact_normals

import nvae_fast as nf
from nvae_fast.kernels import philox as kernels
from nvae_fast.ops import philox

FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    with nf.use_backend("reference"):
        return exact_normals(philox.philox_words(21, 500))


@pytest.mark.parametrize("seed", [0, -3, 2**63 + 9])
def test_words(seed: int) -> None:
    s = philox.as_seed(seed)
    for n, first in ((5, 0), (200, 2**32 - 7), (3, 2**40)):
        with nf.use_backend("reference"):
            expected = philox.philox_words(seed, n, first)
        assert torch.equal(kernels.philox_words_of(s, n, first, 0, blocks=128), expected)
    low, high = kernels.philox_words_of(s, 9, 0, philox.SPLIT, blocks=128)[:, :2].unbind(1)
    with nf.use_backend("reference"):
        assert torch.equal(low | (high & 0x7FFFFFFF) << 32, philox.split_seed(seed, 9))


@pytest.mark.parametrize("count", [1, 5, 1023])
def test_flat_normals(count: int, exact: torch.Tensor) -> None:
    z = kernels.philox_normal((count,), philox.as_seed(21), torch.float32, False, blocks=128)
    assert (z - exact[:count]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("size", [(3, 5, 7, 9), (2, 20, 4, 6), (4, 6, 1, 1), (2, 1, 5, 5)])
@pytest.mark.parametrize("layout", FORMATS, ids=["rows", "channels"])
def test_normals_of_maps(size: tuple[int, ...], layout: torch.memory_format, exact: torch.Tensor) -> None:
    z = kernels.philox_normal(size, philox.as_seed(21), torch.float32, layout == FORMATS[1], blocks=128)
    assert z.is_contiguous(memory_format=layout)
    assert (z.flatten() - exact[: z.numel()]).abs().max() <= TOLERANCE


def test_half_precision_and_no_elements(exact: torch.Tensor) -> None:
    seed = philox.as_seed(21)
    z = kernels.philox_normal((77,), seed, torch.float16, False, blocks=128)
    assert z.dtype == torch.float16
    assert (z - exact[:77]).abs().max() <= 4e-3
    assert kernels.philox_normal((2, 0, 3, 3), seed, torch.float32, True).shape == (2, 0, 3, 3)
