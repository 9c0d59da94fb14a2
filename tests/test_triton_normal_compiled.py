"""The Triton kernels of the normal distributions compiled ahead of time for sm_80, sm_90 and sm_100, as they are launched."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import Binary, Launch, binary, recorded

pytest.importorskip("triton")
from nvae_fast.kernels.maps import Tile

CAPABILITIES = (80, 90, 100)
OPS = ("residual_normal", "normal_sample", "normal_log_prob")
FORMATS = {"rows": torch.contiguous_format, "channels": torch.channels_last}
LARGE = (32, 20, 64, 64)
# Where programs have 8 and 16 warps, whose sums Triton 3.6 to 3.8 could not compile by a gather: groups of the mnist and
# celeba_64 presets, and odd sizes.
SUMMED = [(200, 20, 8, 8), (32, 20, 8, 8), (3, 5, 7, 11), (3, 8, 5, 7)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def launches(
    op: str,
    backward: bool,
    size: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    noise: bool = False,
    prior: bool = True,
    clamp: float | None = 5.0,
) -> list[Launch]:
    """The launches of one call, in which every gradient is wanted."""
    module = importlib.import_module(f"nvae_fast.kernels.{op}")
    b, z, h, w = size

    def empty(channels: int) -> torch.Tensor:
        return torch.empty((b, channels, h, w), dtype=dtype, device="meta", memory_format=FORMATS[layout])

    def launch(name: str, *args: Any) -> list[Launch]:
        return recorded(getattr(module, name + ("_backward" if backward else "")), *args)

    seed = None if noise else torch.empty((), dtype=torch.int64, device="meta")
    eps = empty(z) if noise else None
    sums = [torch.empty((b, z), device="meta") for _ in range(3)]
    given = empty(2 * z) if prior else None
    if op == "residual_normal":
        grads, need = [empty(z), *sums], [True, True, noise]
        args: list[Any] = [empty(2 * z), given, eps, seed, True, clamp, 0.01]
    elif op == "normal_sample":
        grads, need = [empty(z)], [True, noise]
        args = [empty(2 * z), eps, seed, 0.7, clamp, 0.01]
    else:
        grads, need = [sums[0]], [True, True]
        args = [empty(z), given, clamp, 0.01]
    return launch(op, *grads, *args, *need) if backward else launch(op, *args)


def map_launch(*args: Any, **kwargs: Any) -> Launch:
    """The one launch over the map; a second one adds up."""
    first, *rest = launches(*args, **kwargs)
    assert [launch.name for launch in rest] in ([], ["sum_chunks_kernel"])
    return first


def check(found: Binary, launch: Launch) -> None:
    assert found.stack_bytes == 0, found.stack_bytes
    # A multiprocessor has 65,536 registers, and 8 warps at least are resident.
    assert found.registers * 32 * max(8, launch.kwargs["num_warps"]) <= 65_536, found.registers
    assert "atom" not in found.ptx, "sums are added in a fixed order"
    if launch.name == "backward_kernel":
        assert found.shared_bytes == 0, "nothing moves between threads"


# Every kernel in both layouts; both dtypes of residual_normal, whose kernels are the largest, of the others in turn.
COMPILED = [
    (op, backward, layout, dtype)
    for op in OPS
    for backward in (False, True)
    for layout in FORMATS
    for dtype in (torch.float32, torch.bfloat16)
    if op == "residual_normal" or (dtype == torch.float32) == ((layout == "rows") != backward)
]


@pytest.mark.parametrize("index", range(len(COMPILED)))
def test_kernels_compile_without_spills(index: int) -> None:
    """The three architectures in turn."""
    op, backward, layout, dtype = COMPILED[index]
    launch = map_launch(op, backward, LARGE, layout, dtype)
    found = binary(launch, CAPABILITIES[(index + index // 3) % 3])
    check(found, launch)
    # Accesses are 16 bytes wide, or 8 where a run of channels is 4 half-precision numbers.
    access = "v2.b32" if layout == "channels" and dtype == torch.bfloat16 else "v4.b32"
    assert f"ld.global.{access}" in found.ptx
    if backward or op == "normal_sample":
        assert f"st.global.{access}" in found.ptx
        assert found.shared_bytes == 0, "nothing moves between threads"


@pytest.mark.parametrize("size", SUMMED, ids=str)
@pytest.mark.parametrize("op", ["residual_normal", "normal_log_prob"])
def test_small_maps_compile_without_spills(op: str, size: tuple[int, ...]) -> None:
    for backward in (False, True):
        launch = map_launch(op, backward, size, "channels", torch.float32)
        check(binary(launch, 90), launch)


@pytest.mark.parametrize("clamp", [None, 5.0, 200.0])
def test_without_prior_compiles(clamp: float | None) -> None:
    """A standard normal prior, whose sigma is a scalar; with the clamps that are computed in other ways."""
    for op in ("residual_normal", "normal_log_prob"):
        for backward in (False, True):
            launch = map_launch(
                op, backward, (8, 20, 8, 8), "channels", torch.float32, prior=False, clamp=clamp
            )
            check(binary(launch, 90), launch)


# residual_normal on sm_90: issue slots for each element of the map, idle lanes and set-up included, which limit these
# kernels; Triton 3.6 and 3.9 differ by a few. Backward, layout, half precision, noise given, size -> most.
SLOTS = {
    (False, "channels", False, False, LARGE): 157,
    (False, "channels", True, False, LARGE): 163,
    (False, "channels", False, True, LARGE): 120,
    (False, "rows", False, False, LARGE): 164,
    (False, "channels", False, False, (200, 20, 8, 8)): 182,
    (False, "channels", False, False, (32, 20, 16, 16)): 206,
    (False, "rows", False, False, (200, 20, 8, 8)): 180,
    (True, "channels", False, False, LARGE): 178,
    (True, "channels", True, False, LARGE): 187,
    (True, "channels", False, True, LARGE): 144,
    (True, "rows", False, False, LARGE): 186,
    (True, "channels", False, False, (200, 20, 8, 8)): 224,
    (True, "channels", False, False, (32, 20, 16, 16)): 235,
    (True, "rows", False, False, (200, 20, 8, 8)): 203,
}


@pytest.mark.parametrize("case", SLOTS, ids=str)
def test_issue_slots(case: tuple[bool, str, bool, bool, tuple[int, ...]]) -> None:
    backward, layout, half, noise, size = case
    launch = map_launch(
        "residual_normal", backward, size, layout, torch.bfloat16 if half else torch.float32, noise
    )
    assert Tile(*launch.kwargs["TILE"]).iterations == 1, "else instructions of the loop count more than once"
    found = binary(launch, 90)
    b, z, h, w = size
    slots = found.slots(launch, b * z * h * w)
    assert slots <= SLOTS[case], slots
    assert found.count(r"IMAD\.WIDE\.U32") >= (0 if noise else 17), "a product of 64 bits is one instruction"


@pytest.mark.parametrize("op", ["residual_normal", "normal_log_prob"])
def test_second_stage_compiles(op: str) -> None:
    _, second = launches(op, False, LARGE, "channels", torch.float32)
    assert binary(second, 90).stack_bytes == 0
