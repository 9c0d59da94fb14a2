"""The Triton kernels of the normal distributions compiled ahead of time for sm_80, sm_90 and sm_100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

OPS = ("residual_normal", "normal_sample", "normal_log_prob")

POINTERS = (
    [
        "posterior",
        "prior",
        "noise",
        "z",
        "grad_z",
        "grad_posterior",
        "grad_prior",
        "grad_noise",
        "parameters",
        "grad_params",
    ],
    ["out_kl", "out_log_q", "out_log_p", "out", "grad", "grad_kl", "grad_log_q", "grad_log_p"],
)
# Every kernel in both layouts; both dtypes of residual_normal, whose kernels are the largest, of the others in turn.
COMPILED = [
    (op, kernel, layout, dtype)
    for op in OPS
    for kernel in ("forward_kernel", "backward_kernel")
    for layout in ("rows", "channels")
    for dtype in ("fp32", "bf16")
    if op == "residual_normal" or (dtype == "fp32") == ((layout == "rows") == (kernel == "forward_kernel"))
]


def compile_kernel(op: str, kernel: str, layout: str, dtype: str, capability: int) -> tuple[Any, str]:
    """For (32, 20, 16, 16) with the noise drawn: usage and PTX."""
    import aot

    from nvae_fast.kernels import map_launch

    function = getattr(__import__(f"nvae_fast.kernels.{op}", fromlist=["_"]), kernel)
    by_channels, sums = layout == "channels", kernel == "forward_kernel" and op != "normal_sample"
    tile, *_ = map_launch._plan(
        32, 20, 256, by_channels, 4 if by_channels else 1, 4 if dtype == "fp32" else 8, False, sums
    )
    if sums:
        tile = tile._replace(iterations=4)
    constants = {
        "TILE": tuple(tile),
        "CLAMP": 5.0,
        "RESIDUAL": True,
        "SHARED_LOGS": True,
        "noise": None,
        "grad_noise": None,
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = dict.fromkeys(POINTERS[0], f"*{dtype}") | dict.fromkeys(POINTERS[1], "*fp32")
    types |= {"seed": "*i64", "floor": "fp32", "temperature": "fp32"}
    signature = {name: types.get(name, "i32") for name in function.arg_names if name not in constants}
    return aot.triton_usage(function, signature, constants, capability)


@pytest.mark.parametrize("index", range(len(COMPILED)), ids=["-".join(c) for c in COMPILED])
def test_kernels_compile_without_spills(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel in both layouts and dtypes, the three architectures in turn."""
    pytest.importorskip("triton")
    import aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    op, kernel, layout, dtype = COMPILED[index]
    capability = aot.TRITON_CAPABILITIES[(index + index // 3) % 3]
    usage, ptx = compile_kernel(op, kernel, layout, dtype, capability)
    assert usage.spill_bytes == 0, (capability, usage)
    assert usage.stack_bytes == 0
    # Accesses are 16 bytes wide, or 8 where a run of channels is 4 half-precision numbers.
    access = "v2.b32" if layout == "channels" and dtype == "bf16" else "v4.b32"
    assert f"ld.global.{access}" in ptx
    if kernel == "backward_kernel" or op == "normal_sample":
        assert f"st.global.{access}" in ptx
        assert "bar.sync" not in ptx, "nothing moves between threads"
    else:
        # A few exchanges between threads at the end, for each of the sums, and none in the loop.
        assert ptx.count("bar.sync") <= 4 * (3 if op == "residual_normal" else 1) + 2
    assert "atom" not in ptx, "sums are added in a fixed order"


@pytest.mark.parametrize("kinds", [1, 3])
def test_second_stage_compiles(kinds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import aot

    from nvae_fast.kernels import maps

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = dict.fromkeys(("partial", "out_0", "out_1", "out_2"), "*fp32") | {
        "rows": "i32",
        "chunks": "i32",
    }
    usage, _ = aot.triton_usage(
        maps.sum_chunks_kernel, signature, {"KINDS": kinds, "ROWS": 32, "CHUNKS": 32, "STEPS": 2}, 90
    )
    assert usage.spill_bytes == 0
