"""Philox words and normals: the same integers everywhere, normals to 1e-6, whatever the backend, layout or
vector code.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_normals import TOLERANCE, exact_normals
from internals import EXTENSION, needs_extension

import nvae_fast as nf
from nvae_fast.ops import philox
from nvae_fast.ops.philox import new_seed, philox_normal, philox_words, split_seed

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(0,), (1,), (2,), (3,), (5,), (1023,), (3, 5, 7, 9)]
MAPS = [
    (3, 5, 7, 9),
    (2, 20, 16, 16),
    (2, 37, 13, 13),
    (3, 100, 4, 4),
    (2, 33, 8, 17),
    (2, 3, 0, 4),
    (4, 6, 1, 1),
]
SEEDS = [0, 1, -1, 2**64 - 2, 2**63, 123456789012345678]


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """Run ``code`` in a fresh interpreter with these environment variables; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Words.


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    # The known-answer vectors published with Random123.
    def tensors(text: str) -> list[torch.Tensor]:
        return [torch.tensor([int(word, 16)]) for word in text.split()]

    got = philox.philox4x32(tensors(counter), tensors(key))
    assert [f"{int(word):08x}" for word in got] == expected.split()


def test_known_answer_of_the_operator(device: torch.device) -> None:
    words = philox_words(torch.zeros((), dtype=torch.int64, device=device), 1)
    assert [f"{int(word):08x}" for word in words[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_those_of_the_reference(seed: int, device: torch.device) -> None:
    seed_tensor = philox.as_seed(seed, device)
    for count, first in [(0, 0), (1, 0), (17, 5), (1000, 2**32 - 3), (333, 2**40 + 1), (70, 3 * 2**32 - 64)]:
        ours = philox_words(seed_tensor, count, first)
        with nf.use_backend("reference"):
            reference = philox_words(seed_tensor, count, first)
        assert ours.shape == (count, 4)
        assert ours.dtype == torch.int64
        assert torch.equal(ours, reference), (count, first)


def test_words_of_a_block_do_not_depend_on_the_call() -> None:
    whole = philox_words(3, 100)
    assert torch.equal(philox_words(3, 40, 60), whole[60:])
    assert int(whole.min()) >= 0
    assert int(whole.max()) < 2**32


# Normals.


@pytest.mark.parametrize("size", SIZES)
def test_normals_against_float64(size: tuple[int, ...], device: torch.device, route: str) -> None:
    seed = philox.as_seed(11, device)
    z = philox_normal(size, seed)
    count = math.prod(size)
    expected = exact_normals(philox_words(seed, -(-count // 4)))[:count]
    assert z.shape == size
    assert z.dtype == torch.float32
    if count:
        assert (z.cpu().double().reshape(-1) - expected).abs().max() <= TOLERANCE


def test_many_normals_against_float64(device: torch.device) -> None:
    seed = philox.as_seed(12, device)
    z = philox_normal((1_000_001,), seed).cpu().double()
    expected = exact_normals(philox_words(seed, 250_001))[:1_000_001]
    assert (z - expected).abs().max() <= TOLERANCE
    # Relative, too: small draws keep their digits.
    assert ((z - expected).abs() / expected.abs()).max() <= 1e-6


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize("dtype", philox.DTYPES)
def test_layouts_and_dtypes(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device, route: str
) -> None:
    seed = philox.as_seed(5, device)
    plain = philox_normal(size, seed)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        z = philox_normal(size, seed, dtype=dtype, memory_format=memory_format)
        assert z.dtype == dtype
        assert z.stride() == torch.empty(size, memory_format=memory_format).stride()
        # The float32 value, rounded: bit for bit, in any layout.
        assert torch.equal(z, plain.to(dtype))


def test_backends_agree(device: torch.device) -> None:
    for size in [(5,), (1023,), (2, 20, 16, 16)]:
        seed = philox.as_seed(99, device)
        z = philox_normal(size, seed)
        with nf.use_backend("reference"):
            reference = philox_normal(size, seed)
        assert (z - reference).abs().max() <= TOLERANCE


def test_a_smaller_batch_is_a_prefix(device: torch.device) -> None:
    seed = philox.as_seed(8, device)
    whole = philox_normal((6, 5, 7, 9), seed, memory_format=torch.channels_last)
    for batch in (0, 1, 4):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            part = philox_normal((batch, 5, 7, 9), seed, memory_format=memory_format)
            assert torch.equal(part, whole[:batch])


def test_threads_do_not_matter() -> None:
    before = torch.get_num_threads()
    try:
        draws = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            flat = philox_normal((300_007,), 4)
            last = philox_normal((3, 37, 53, 53), 4, memory_format=torch.channels_last)
            draws.append((flat, last))
    finally:
        torch.set_num_threads(before)
    for flat, last in draws[1:]:
        assert torch.equal(flat, draws[0][0])
        assert torch.equal(last, draws[0][1])


_CAPABILITY = """
import sys, numpy as np, torch
from nvae_fast.ops import _extension, philox
words = philox.philox_words(77, 1000, 2**32 - 500)
maps = [philox.philox_normal(size, 77, dtype=dtype, memory_format=torch.channels_last).float().contiguous()
        for size in ((2, 37, 13, 13), (2, 20, 16, 16)) for dtype in philox.DTYPES]
flat = philox.philox_normal((50_003,), 77)
np.savez(sys.argv[1], words=words, flat=flat, **{f"map{i}": m for i, m in enumerate(maps)})
print(_extension.info()["cpu_capability"])
"""


@needs_extension
def test_every_vector_code_draws_the_same(tmp_path: Path) -> None:
    results = {}
    for capability in EXTENSION["cpu_capabilities"]:
        path = tmp_path / f"{capability}.npz"
        used = run_python(_CAPABILITY, path, NVAE_FAST_CPU_CAPABILITY=capability).strip()
        if used == capability:  # else this processor lacks it
            results[capability] = dict(np.load(path))
    assert "baseline" in results
    with nf.use_backend("reference"):
        words = philox_words(77, 1000, 2**32 - 500).numpy()
    expected = exact_normals(philox_words(77, 12501))[:50_003].numpy()
    first = results["baseline"]
    for result in results.values():
        assert np.array_equal(result["words"], words)
        assert np.abs(result["flat"] - expected).max() <= TOLERANCE
        assert np.abs(result["flat"] - first["flat"]).max() <= TOLERANCE
        for key in first:
            if key.startswith("map"):
                # One float32 ulp may fall on either side of a rounding boundary of the 16-bit dtypes.
                assert np.allclose(result[key], first[key], rtol=2**-7, atol=TOLERANCE), key


# Seeds.


def test_seed_is_taken_modulo_two_to_the_64() -> None:
    assert torch.equal(philox_normal((9,), -1), philox_normal((9,), 2**64 - 1))
    assert torch.equal(philox_normal((9,), 3), philox_normal((9,), 3 + 2**64))
    assert torch.equal(philox_normal((9,), 2**63), philox_normal((9,), torch.tensor(-(2**63))))
    assert torch.equal(philox_normal((9,), np.int32(7)), philox_normal((9,), torch.tensor(7)))
    assert not torch.equal(philox_normal((9,), 2**32), philox_normal((9,), 0))


def test_new_seed_follows_the_generator(device: torch.device) -> None:
    torch.manual_seed(3)
    first = new_seed(device)
    second = new_seed(device)
    torch.manual_seed(3)
    assert torch.equal(first, new_seed(device))
    assert first != second
    assert first.dtype == torch.int64
    assert first.dim() == 0
    assert first.device.type == device.type


def test_split_seed(device: torch.device, route: str) -> None:
    seed = philox.as_seed(5, device)
    subs = split_seed(seed, 1000)
    assert subs.shape == (1000,)
    assert subs.dtype == torch.int64
    assert int(subs.min()) >= 0
    assert torch.equal(split_seed(seed, 10), subs[:10])
    every = torch.cat([split_seed(philox.as_seed(s, device), 1000) for s in range(20)])
    assert every.unique().numel() == every.numel()  # neighbouring seeds share none
    words = philox.philox4x32(
        [torch.tensor([7]), torch.tensor([0]), torch.tensor([philox.SPLIT]), torch.tensor([0])],
        [torch.tensor([5]), torch.tensor([0])],
    )
    assert int(subs[7]) == int(words[0]) + (int(words[1]) % 2**31) * 2**32
    assert split_seed(seed, 0).shape == (0,)


# Statistics: of one fixed seed, so that they either hold or do not.


def test_moments_and_distribution() -> None:
    n = 1_000_000
    z = philox_normal((n,), 2024).double()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    ordered = 0.5 * (1 + torch.erf(z.sort().values / 2**0.5))
    grid = torch.arange(n, dtype=torch.float64) / n
    distance = max((ordered - grid).max(), (grid + 1 / n - ordered).max())  # Kolmogorov-Smirnov
    assert distance * n**0.5 < 1.95  # one in a thousand beyond


def test_elements_blocks_and_seeds_are_uncorrelated() -> None:
    n = 1_000_000
    z = philox_normal((n,), 31).double()
    neighbour_seed = philox_normal((n,), 32).double()
    far_seed = philox_normal((n,), 31 + 2**32).double()
    for lag in (1, 2, 3, 4, 8, 64):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4.5 / n**0.5, lag
    four = z.reshape(-1, 4)
    for i in range(4):
        for j in range(i):
            assert abs((four[:, i] ** 2 * four[:, j] ** 2).mean() - 1) < 4.5 * (8 * 4 / n) ** 0.5, (i, j)
    assert abs((z * neighbour_seed).mean()) < 4.5 / n**0.5
    assert abs((z * far_seed).mean()) < 4.5 / n**0.5


# Errors, and PyTorch's tools.


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "seed must be an int or a 0-d int64 tensor, got float", {"seed": 1.5}),
        (TypeError, "seed must be an int or a 0-d int64 tensor, got bool", {"seed": True}),
        (TypeError, "seed must be an int or a 0-d int64 tensor, got str", {"seed": "7"}),
        (
            TypeError,
            "a seed tensor must be int64, got torch.int32",
            {"seed": torch.tensor(1, dtype=torch.int32)},
        ),
        (ValueError, r"a seed tensor must be 0-d, got shape \(2,\)", {"seed": torch.tensor([1, 2])}),
        (ValueError, "seed tensor must be on meta, got cpu", {"seed": torch.tensor(1), "device": "meta"}),
        (TypeError, "size must be a sequence of ints, got int", {"size": 5}),
        (TypeError, "size must hold ints, got float", {"size": (2, 2.0)}),
        (ValueError, r"no negative extent, got \(2, -1\)", {"size": (2, -1)}),
        (TypeError, "dtype must be one of .* got torch.int32", {"dtype": torch.int32}),
        (ValueError, "channels_last needs four dimensions", {"memory_format": torch.channels_last}),
        (ValueError, "memory_format must be", {"memory_format": torch.preserve_format}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, arguments: dict) -> None:
    with pytest.raises(error, match=message):
        philox_normal(**{"size": (4,), "seed": 0, **arguments})


def test_bad_counts() -> None:
    with pytest.raises(ValueError, match="n_blocks must be >= 0, got -1"):
        philox_words(0, -1)
    with pytest.raises(TypeError, match="first_block must be an int, got float"):
        philox_words(0, 1, 2.0)
    with pytest.raises(ValueError, match="n must be >= 0, got -2"):
        split_seed(0, -2)


def test_bad_arguments_of_the_operator() -> None:
    with pytest.raises(RuntimeError, match="seed must be a 0-d int64 tensor"):
        torch.ops.nvae_fast.philox_normal([4], torch.tensor([1.0, 2.0]), torch.float32, False)


def test_opcheck(device: torch.device) -> None:
    seed = philox.as_seed(1, device)
    ops = torch.ops.nvae_fast
    torch.library.opcheck(ops.philox_normal.default, ([2, 3, 4, 5], seed, torch.bfloat16, True))
    torch.library.opcheck(ops.philox_normal.default, ([7], seed, torch.float32, False))
    torch.library.opcheck(ops.philox_words.default, (seed, 5, 3))
    torch.library.opcheck(ops.split_seed.default, (seed, 5))


def test_fullgraph_compile(device: torch.device) -> None:
    def draw(x: torch.Tensor, seed: torch.Tensor | int) -> torch.Tensor:
        z = philox_normal(x.shape, seed, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return z + split_seed(seed, 3).sum() * 0

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x = torch.zeros(batch, 4, 5, 6, device=device)
        for seed in (philox.as_seed(6, device), philox.as_seed(7, device)):
            assert torch.equal(compiled(x, seed), draw(x, seed))

    def fresh(x: torch.Tensor) -> torch.Tensor:
        return philox_normal(x.shape, new_seed(x.device), device=x.device)

    assert torch.compile(fresh, fullgraph=True, backend="aot_eager")(x).shape == x.shape


def test_backends_names_it() -> None:
    row = nf.backends()["philox"]
    assert row["cpu"] == "cpp" or row["cpu"].startswith("reference (")
    with nf.use_backend("reference"):
        assert nf.backends()["philox"]["cpu"].startswith("reference (")
