"""The Triton kernels of the normal distributions against the reference in float64."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import relative_error
from internals import DEFINITIONS
from normal_cases import BOTH, FORMATS, LARGE, OPS, TWO_TILES, Case, arguments, cases, compute

import nvae_fast as nf
from nvae_fast.kernels import map_launch
from nvae_fast.ops.philox import philox_normal

KERNELS = {name: DEFINITIONS[name].launch for op in OPS for name in (op, f"{op}_backward")}


@pytest.fixture
def choices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """The case, with its launch choices in use."""
    for name, value in request.param.choices:
        monkeypatch.setattr(map_launch, name, value)
    map_launch._plan.cache_clear()
    yield request.param
    map_launch._plan.cache_clear()


def layout_of(t: torch.Tensor) -> tuple[Any, ...]:
    return t.dtype, tuple(t.shape), [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


@pytest.mark.parametrize("choices", cases(), ids=lambda case: case.name, indirect=True)
def test_values_and_gradients(choices: Case) -> None:
    """Their dtypes and strides too."""
    case = choices
    found = compute(case, KERNELS[case.op], KERNELS[f"{case.op}_backward"])
    if case.choices in (TWO_TILES, LARGE):
        again = compute(case, KERNELS[case.op], KERNELS[f"{case.op}_backward"])
        assert all(torch.equal(value, again[key]) for key, value in found.items()), "two runs differ"
    forward, backward = DEFINITIONS[case.op], DEFINITIONS[f"{case.op}_backward"]
    with nf.use_backend("reference"):
        truth = compute(case, forward.formula, backward.formula, torch.float64, True)
        native = compute(case, forward.formula, backward.formula, None, True)
        args, backward_args = arguments(case, None, False)
        shapes = forward.fake(*args)
        shapes = (shapes,) if isinstance(shapes, torch.Tensor) else shapes
        shapes = [*shapes, *(t for t in backward.fake(*backward_args) if t.dim() == 4)]
    assert found.keys() == truth.keys()
    for (key, expected), like in zip(truth.items(), shapes, strict=True):
        assert layout_of(found[key]) == layout_of(like), key
        unavoidable = relative_error(expected.to(like.dtype), expected)
        lost = relative_error(native[key], expected)
        bound = case.tolerance * max(lost, unavoidable, torch.finfo(torch.float32).eps)
        error = relative_error(found[key], expected)
        assert error <= bound, f"{key}: relative error {error:.3g} exceeds {bound:.3g}"


HARD = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 88.0, float("inf"), -float("inf"), float("nan")])


def hard(clamp: float | None, functions: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Outputs and gradients at every pair of extreme values for posterior and prior, a pair to a sample."""
    grid = HARD[torch.tensor(list(itertools.product(range(len(HARD)), repeat=2)))]
    posterior, prior = grid.reshape(-1, 2, 1, 1), grid.flip(0).reshape(-1, 2, 1, 1)
    noise = torch.ones(len(grid), 1, 1, 1)
    floor = 0.0 if clamp is None else 0.01
    args = (posterior, prior, noise, None, False, clamp, floor)
    found = {f"output {i}": t for i, t in enumerate(functions["residual_normal"](*args))}
    found["log_prob"] = functions["normal_log_prob"](noise, posterior, clamp, floor)
    if clamp is not None:  # without a clamp, infinities meet in another order
        upstream = [torch.ones_like(noise), *(torch.ones(len(grid), 1) for _ in range(3))]
        gradients = functions["residual_normal_backward"](*upstream, *args, True, True, True)
        found |= {f"gradient {i}": t for i, t in enumerate(gradients)}
    return found


STREAMS = [
    ((2, 20, 4, 6), -3),
    ((3, 5, 7, 9), 2**62 + 9),
    ((4, 6, 1, 1), 0),
    ((2, 1, 5, 5), -(2**63)),
    ((2, 34, 2, 2), 7),
]


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("size, seed", STREAMS, ids=str)
def test_noise_is_the_stream_of_philox_normal(
    size: tuple[int, int, int, int], seed: int, layout: str
) -> None:
    """In every layout. With mu 0 and sigma 1, z is the noise."""
    b, z, h, w = size
    params = torch.zeros(b, 2 * z, h, w).contiguous(memory_format=FORMATS[layout])
    drawn = KERNELS["residual_normal"](params, None, None, torch.tensor(seed), True, None, 0.0)[0]
    assert torch.equal(drawn, KERNELS["normal_sample"](params, None, torch.tensor(seed), 1.0, None, 0.0))
    assert (drawn - philox_normal(size, seed)).abs().max() <= 1e-6


@pytest.mark.parametrize("clamp", [5.0, None])
def test_extremes(clamp: float | None) -> None:
    """NaN where the reference has NaN, and the same numbers elsewhere."""
    with nf.use_backend("reference"):
        expected = hard(clamp, {name: DEFINITIONS[name].formula for name in KERNELS})
    for key, actual in hard(clamp, KERNELS).items():
        value, scale = expected[key], 1.0
        if key.startswith("gradient"):
            # Ratios of sigmas are e^20 there, times derivatives of which the reference has the rounding of 1 - tanh^2 left.
            scale = float(value.nan_to_num(posinf=0, neginf=0).abs().max())
        torch.testing.assert_close(
            actual, value, rtol=2e-5, atol=2e-5 * scale, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


# Launching.


def test_launch_choices() -> None:
    """One axis, few programs, wide offsets where they are due; tiles cover the map whatever its size."""
    from nvae_fast.kernels.map_launch import MULTIPROCESSORS, Map, _plan

    for batches, channels, pixels in itertools.product(
        (1, 7, 200, 65_537), (1, 20, 33, 130), (1, 13, 64, 2304, 2**20)
    ):
        for by_channels, sums in itertools.product((True, False), repeat=2):
            width = 4 if by_channels and channels % 4 == 0 else 2 if by_channels and channels % 2 == 0 else 1
            tile, chunks, programs, warps = _plan(
                batches, channels, pixels, by_channels, width, 4, False, sums
            )
            assert programs < 2**31 or batches * channels * pixels > 2**40
            assert chunks * tile.iterations * tile.span >= pixels
            if by_channels:
                assert tile.bundle >= tile.groups * tile.parts
                assert tile.span == tile.lanes // tile.bundle * tile.pixels
                assert tile.groups * tile.slices * tile.width >= channels
                assert programs == -(-batches * chunks // tile.parts) * tile.slices
            else:
                assert programs == -(-batches * channels // tile.lanes) * chunks
            count = batches * channels * pixels
            if count > 2**20 and pixels in (64, 2304, 2**20) and channels == 20:
                work = programs * tile.iterations * tile.lanes * tile.width * tile.pixels
                assert work <= 1.5 * count, (batches, channels, pixels, tile)
            # Four elements a thread where there would be too few programs, up to 16 where there are enough.
            elements = tile.lanes * tile.width * tile.pixels // (32 * warps)
            if count < 4 * 128 * MULTIPROCESSORS and not sums:
                assert elements <= 4, (batches, channels, pixels, tile)
            if count > 2**24 and channels == 20 and pixels in (64, 2**20):
                assert elements == (16 if by_channels else 8), (batches, channels, pixels, tile)
    # The sizes of the model keep nine lanes in ten at work; where sums would need a second launch, six.
    for pixels, batches in itertools.product((16, 64, 256, 1024, 4096, 16384), (32, 64, 200)):
        for sums, busy in ((False, 0.9), (True, 0.6)):
            tile, _, programs, _ = _plan(batches, 20, pixels, True, 4, 4, False, sums)
            lanes = programs * tile.iterations * tile.lanes * tile.width * tile.pixels
            assert batches * 20 * pixels >= busy * lanes, (pixels, tile)
    small = torch.empty(1, 4, 2, 2)
    assert not Map("op", small, packed=True).launch(sums=False).tile.offsets64
    large = torch.empty(1).expand(5, 2**16, 2**13, 1)
    space = Map("op", large, packed=True)
    assert space.launch(sums=False).tile.offsets64


def test_float64_is_the_references() -> None:
    case = Case("residual_normal", size=(2, 2, 3, 2), noise=True)
    for op in OPS:
        case = replace(case, op=op)
        forward, backward = DEFINITIONS[op], DEFINITIONS[f"{op}_backward"]
        found = compute(case, forward.launch, backward.launch, torch.float64)
        expected = compute(case, forward.formula, backward.formula, torch.float64)
        for key, value in expected.items():
            assert torch.equal(found[key], value)
        kernels = importlib.import_module(f"nvae_fast.kernels.{op}")
        with pytest.raises(
            TypeError, match=f"^{op}: the GPU kernel computes in float32; .*got torch.float64"
        ):
            compute(case, getattr(kernels, op), getattr(kernels, f"{op}_backward"), torch.float64, True)


def test_empty() -> None:
    for op, size in itertools.product(OPS, ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4))):
        kernels = importlib.import_module(f"nvae_fast.kernels.{op}")
        case = Case(op, size=size, noise=True)
        found = compute(case, getattr(kernels, op), getattr(kernels, f"{op}_backward"), None, True)
        expected = compute(case, DEFINITIONS[op].formula, DEFINITIONS[f"{op}_backward"].formula, None, True)
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
        assert all(not value.any() for value in found.values())
