"""The CUDA kernels of depthwise_conv2d without a GPU: run on the CPU by a stand-in for CUDA (tests/cuda_shim), and
compiled by nvcc with registers counted. With a GPU the operators themselves are tested too."""

from __future__ import annotations

import ctypes
from typing import Any

import aot
import cuda_shim
import pytest
import sass
import torch
import torch.nn.functional as F
from harness import assert_close

from nvae_fast.ops._activation import activate

FAST = (torch.float32, torch.bfloat16, torch.float16)
STEPS = cuda_shim.STEPS
VECTORS = ("scale", "shift", "alpha", "beta", "gamma", "pivot")
GRADIENTS = ("x", "weight", "scale", "shift")


def inputs(
    kernel: int, size: tuple[int, ...], dtype: torch.dtype, step: tuple[int, int, int]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    b, c, h, w = size
    stride, _dilation, upsample = step
    out = (b, c, cuda_shim.extent(h, stride, upsample), cuda_shim.extent(w, stride, upsample))
    t = {
        "x": normal(*size),
        "weight": normal(c, 1, kernel, kernel),
        "grad": normal(*out),
        "out": normal(*out),
    }
    t = {name: value.to(dtype) for name, value in t.items()}
    wide = cuda_shim.accumulate(dtype)
    return t | {name: normal(c).to(wide) for name in VECTORS}


def truth(t: dict[str, Any], step: tuple[int, int, int], activation: str | None, taps: Any = None) -> dict:
    """Outputs and gradients of the formula in float64, of the same inputs."""
    wide = {name: v.double() for name, v in t.items() if v is not None}
    leaves = {n: wide[n].requires_grad_() for n in GRADIENTS if n in wide}
    h, weight, (stride, dilation, upsample) = leaves["x"], leaves["weight"], step
    if taps is not None:
        mask = torch.zeros(weight.shape[-1] ** 2, dtype=torch.float64)
        mask[taps] = 1
        weight = weight * mask.view(weight.shape[-2:])
    if "scale" in leaves:
        h = h * leaves["scale"][:, None, None] + leaves["shift"][:, None, None]
    h = activate(h, activation).repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    pad = weight.shape[-1] // 2 * dilation
    y = F.conv2d(h, weight, stride=stride, padding=pad, dilation=dilation, groups=weight.shape[0])
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    m2 = var * (y.numel() // y.shape[1])
    dy = wide["grad"]
    if "alpha" in wide:
        alpha, beta, gamma = (wide[n][:, None, None] for n in ("alpha", "beta", "gamma"))
        dy = alpha * dy + beta * wide["out"] + gamma
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    result = {f"grad {n}": g for n, g in zip(leaves, found, strict=True)}
    if "scale" in wide and "pivot" in wide:
        result["grad scale"] = result["grad scale"] - wide["pivot"] * result["grad shift"]
    return {"y": y.detach(), "mean": mean.detach(), "m2": m2.detach(), **result}


def kernels(
    t: dict[str, Any],
    step: tuple[int, int, int],
    activation: str | None,
    taps: Any = None,
    channels_last: bool = True,
    device: int = 0,
    offset: int = 0,
) -> dict:
    common = (t["x"], t["weight"], t.get("scale"), t.get("shift"), *step, activation)
    where = {"device": device, "offset": offset}
    y, mean, m2 = cuda_shim.forward(*common, True, taps, channels_last, **where)
    extra = {n: t[n] for n in ("out", "alpha", "beta", "gamma", "pivot") if n in t}
    gradients = cuda_shim.backward(t["grad"], *common, taps, channels_last, **extra, **where)
    return {"y": y, "mean": mean, "m2": m2} | {
        f"grad {n}": g for n, g in zip(GRADIENTS, gradients, strict=True)
    }


def compare(actual: dict, expected: dict, dtype: torch.dtype) -> None:
    for name, value in expected.items():
        # Inside, fp32; on the way out the rounding of the result's own type. Statistics are of the rounded y.
        stored = torch.finfo(actual[name].dtype).eps
        bound = 2e-6 if dtype != torch.float64 else 1e-13
        if name in ("mean", "m2"):
            stored = torch.finfo(dtype).eps
        assert_close(actual[name], value, bound + stored / 2 * 1.2, name)


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kernel", [3, 5, 7, 11])
def test_fast_kernels(kernel: int, step: str, dtype: torch.dtype) -> None:
    """Vectors and their absence (40 channels), several tiles of columns and strips of rows, images that share a block."""
    activation = {3: None, 5: "swish", 7: "elu", 11: "swish"}[kernel]
    steps = STEPS[step]
    for size in ((2, 40, 9, 7), (1, 3, 18, 21), (3, 8, 4, 5)):
        t = inputs(kernel, size, dtype, steps)
        compare(kernels(t, steps, activation), truth(t, steps, activation), dtype)


@pytest.mark.parametrize("device", cuda_shim.DEVICES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kernel", [3, 5, 7, 11])
def test_shared_memory(kernel: int, step: str, device: str) -> None:
    """Every launch is one that the device allows: blocks of an L40, an RTX 30, 40 or 50 have 99 KB, of an A100 163."""
    number, most = list(cuda_shim.DEVICES).index(device), cuda_shim.DEVICES[device]
    for dtype in FAST:
        for size in cuda_shim.SIZES:
            launches = cuda_shim.plan(size, kernel, dtype, STEPS[step], number)
            assert len(launches) == 4
            assert max(launch.shared for launch in launches) <= most


@pytest.mark.parametrize("device", [1, 2], ids=list(cuda_shim.DEVICES)[1:])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kernel", [3, 5, 7, 11])
def test_devices_with_less_shared_memory(kernel: int, step: str, device: int) -> None:
    for size in ((4, 40, 4, 4), (3, 32, 9, 8)):
        t = inputs(kernel, size, torch.float32, STEPS[step])
        compare(kernels(t, STEPS[step], "elu", device=device), truth(t, STEPS[step], "elu"), torch.float32)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("kernel, step", [(3, "up"), (5, "plain"), (7, "stride"), (11, "dilated")])
def test_maps_that_begin_at_any_element(kernel: int, step: str, dtype: torch.dtype, offset: int) -> None:
    """Slices of a batch or of a buffer: vectors are loaded and stored only where they are aligned."""
    for channels in (32, 34):
        t = inputs(kernel, (2, channels, 5, 6), dtype, STEPS[step])
        found = kernels(t, STEPS[step], "swish", offset=offset)
        compare(found, truth(t, STEPS[step], "swish"), dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kernel", [1, 5, 9])
def test_general_kernels(kernel: int, step: str, channels_last: bool) -> None:
    """float64 and other kernel widths, both layouts; float32 with activations of its own."""
    steps = STEPS[step]
    for dtype, activation in ((torch.float64, "swish"), (torch.float32, "elu")):
        t = inputs(kernel, (2, 3, 6, 5), dtype, steps)
        compare(kernels(t, steps, activation, None, channels_last), truth(t, steps, activation), dtype)


@pytest.mark.parametrize("taps", [cuda_shim.FIRST, cuda_shim.LAST, [0, 7, 24]], ids=["first", "last", "some"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_taps(taps: list[int], step: str, channels_last: bool) -> None:
    steps = STEPS[step]
    t = inputs(5, (2, 9, 7, 6), torch.float32, steps)
    found = kernels(t, steps, "elu", taps, channels_last)
    compare(found, truth(t, steps, "elu", taps), torch.float32)
    dead = [tap for tap in range(25) if tap not in taps]
    assert not found["grad weight"].flatten(1)[:, dead].any()


@pytest.mark.parametrize("activation", [None, "swish", "elu"])
@pytest.mark.parametrize("given", [(), ("scale", "shift"), ("out", "alpha", "beta", "gamma")], ids=str)
def test_optional_arguments(given: tuple, activation: str | None) -> None:
    t = inputs(3, (2, 5, 6, 9), torch.float32, STEPS["plain"])
    t = {n: v for n, v in t.items() if n in ("x", "weight", "grad", *given)}
    found, expected = kernels(t, STEPS["plain"], activation), truth(t, STEPS["plain"], activation)
    compare(found, {n: v for n, v in expected.items() if v is not None}, torch.float32)


@pytest.mark.parametrize("kernel, step", [(5, "plain"), (11, "up"), (7, "stride"), (9, "plain")])
def test_unneeded_gradients_are_left_out(kernel: int, step: str) -> None:
    steps = STEPS[step]
    t = inputs(kernel, (2, 8, 6, 5), torch.float32, steps)
    common = (t["grad"], t["x"], t["weight"], t["scale"], t["shift"], *steps, "swish")
    every = cuda_shim.backward(*common)
    for need in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        found = cuda_shim.backward(*common, need=need)
        for a, e, wanted in zip(found, every, (need[0], need[1], need[2], need[2]), strict=True):
            assert torch.equal(a, e) if wanted else a is None


@pytest.mark.parametrize(
    "kernel, size", [(5, (3, 40, 19, 21)), (5, (130, 8, 4, 4)), (11, (9, 33, 9, 17)), (9, (4, 3, 9, 9))]
)
def test_statistics_far_from_zero(kernel: int, size: tuple[int, ...]) -> None:
    """|mean| / std = 100, over threads, blocks and strips."""
    x = torch.randn(size, dtype=torch.float64) + 100
    weight = torch.zeros(size[1], 1, kernel, kernel)
    weight[:, 0, kernel // 2, kernel // 2] = torch.linspace(-2, 2, size[1])
    y, mean, m2 = cuda_shim.forward(x.float(), weight, stats=True)
    wide = y.double()
    assert_close(mean, wide.mean((0, 2, 3)), 1e-6, "mean")
    assert_close(m2, (wide - wide.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3)), 1e-5, "m2")


@pytest.mark.parametrize(
    "kernel, step", [(5, "plain"), (11, "plain"), (11, "stride"), (7, "up"), (9, "plain")]
)
def test_same_bits_whatever_order_threads_run_in(kernel: int, step: str) -> None:
    """No sum depends on which thread came first, and no barrier is missing."""
    t = inputs(kernel, (3, 40, 17, 18), torch.bfloat16, STEPS[step])
    runs = []
    for seed in range(3):
        cuda_shim.library().shim_seed(seed)
        runs.append(kernels(t, STEPS[step], "swish"))
    cuda_shim.library().shim_seed(0)
    for name in runs[0]:
        assert all(torch.equal(run[name], runs[0][name]) for run in runs[1:]), name


@pytest.mark.parametrize(
    "size", [(0, 3, 5, 4), (2, 3, 1, 1), (5, 1, 2, 33), (1, 2, 1, 40), (2, 64, 40, 1)], ids=str
)
@pytest.mark.parametrize(
    "kernel, step", [(5, "plain"), (11, "stride"), (3, "up"), (5, "both"), (7, "dilated"), (9, "plain")]
)
def test_extreme_sizes(size: tuple[int, ...], kernel: int, step: str) -> None:
    steps = STEPS[step]
    t = inputs(kernel, size, torch.float32, steps)
    found = kernels(t, steps, None)
    if size[0]:
        compare(found, truth(t, steps, None), torch.float32)
    else:
        assert not any(value.any() for value in found.values())


def test_non_finite_stays_in_its_window() -> None:
    x = torch.randn(1, 8, 13, 13)
    x[0, 3, 6, 6] = float("inf")
    for kernel in (5, 7, 11):
        y = cuda_shim.forward(x, torch.ones(8, 1, kernel, kernel))[0]
        bad, reach = torch.zeros_like(x, dtype=torch.bool), kernel // 2
        bad[0, 3, 6 - reach : 7 + reach, 6 - reach : 7 + reach] = True
        assert torch.equal(~y.isfinite(), bad)


def test_which_kernels_are_fast() -> None:
    p = cuda_shim.Forward()
    for channels_last, dtype, kernel, fast in (
        (1, torch.float16, 11, True),
        (1, torch.float64, 5, False),
        (0, torch.float32, 5, False),
        (1, torch.float32, 9, False),
    ):
        p.channels_last, p.dtype, p.kernel = channels_last, cuda_shim.DTYPES.index(dtype), kernel
        assert bool(cuda_shim.library().shim_is_fast(ctypes.byref(p))) == fast


def test_too_little_shared_memory_is_an_error_that_says_so() -> None:
    p, library = cuda_shim.Forward(), cuda_shim.library()
    memory = cuda_shim.Memory(library)
    x, weight = torch.zeros(4, 32, 8, 8), torch.zeros(32, 1, 11, 11)
    cuda_shim.describe(p, memory, x, weight, None, None, 2, 1, 1, None, None, True, cuda_shim.T4)
    p.y = memory.fresh_map("y", (4, 32, 4, 4), x.dtype, True).data_ptr()
    needed = library.shim_forward_shared_memory(ctypes.byref(p))
    error = library.shim_forward(ctypes.byref(p))
    text = ctypes.create_string_buffer(200)
    library.shim_forward_error(error, ctypes.byref(p), text, ctypes.c_size_t(200))
    assert error != 0
    assert text.value.decode() == f"a block needs {needed} bytes of shared memory, this GPU has {64 * 1024}"
    assert not cuda_shim.reports(library)


def on_the_gpu(
    t: dict[str, Any], step: tuple[int, int, int], activation: str | None, taps: Any, channels_last: bool
) -> dict:
    ops, name = torch.ops.nvae_fast, "nvae_fast::depthwise_conv2d"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), "the extension has no CUDA sources"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    t = {
        n: v.cuda().contiguous(memory_format=memory_format) if v.dim() == 4 else v.cuda()
        for n, v in t.items()
    }
    problem = (t["x"], t["weight"].contiguous(), t["scale"], t["shift"], *step, activation)
    y, mean, m2 = ops.depthwise_conv2d(*problem, True, taps)
    assert y.is_contiguous(memory_format=memory_format)
    combined = (t[n] for n in ("grad", "out", "alpha", "beta", "gamma", "pivot"))
    gradients = ops.depthwise_conv2d_backward(*combined, *problem, taps, True, True, True)
    return {"y": y, "mean": mean, "m2": m2} | {
        f"grad {n}": g for n, g in zip(GRADIENTS, gradients, strict=True)
    }


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FAST, torch.float64])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "kernel, taps", [(3, None), (5, None), (5, cuda_shim.LAST), (7, None), (9, None), (11, None)]
)
def test_operators_on_the_gpu(
    kernel: int, taps: Any, step: str, channels_last: bool, dtype: torch.dtype
) -> None:
    steps = STEPS[step]
    for size in ((3, 40, 17, 18), (1, 3, 5, 70)):
        t = inputs(kernel, size, dtype, steps)
        first, second = (on_the_gpu(t, steps, "swish", taps, channels_last) for _ in range(2))
        compare({n: v.cpu() for n, v in first.items()}, truth(t, steps, "swish", taps), dtype)
        assert all(torch.equal(first[n], second[n]) for n in first), "two runs differ"


@pytest.mark.parametrize("arch", aot.CUDA_ARCHS)
def test_registers(arch: str) -> None:
    """The 5x5 kernels in bf16: forward five blocks of 128 threads to a multiprocessor, backward three (four and two
    where ptxas would spill); no spills."""
    forward, backward = sorted(
        aot.nvcc_usages(cuda_shim.HERE / "registers.cu", arch), key=lambda usage: usage.registers
    )
    hopper = arch == "sm_90a"
    assert forward.registers <= (96 if hopper else 128)
    assert backward.registers <= (168 if hopper else 255)
    assert forward.spill_bytes == backward.spill_bytes == 0
    assert forward.stack_bytes == backward.stack_bytes == 0


@pytest.mark.parametrize(
    "size, bars",
    [((32, 768, 16, 16), (61.5, 110.5)), ((200, 192, 8, 8), (74.5, 138.5))],
    ids=["16x16", "8x8"],
)
def test_issue_slots(size: tuple[int, int, int, int], bars: tuple[float, float]) -> None:
    """Instructions that a warp issues per output and lane on sm_90a, everything included: of the multiply-adds there are
    25 forward and 50 backward."""
    found = {name: sum(regions.values()) for name, regions in sass.depthwise_slots(size, "sm_90a").items()}
    for call, multiply_adds, bar in zip(("forward", "backward"), (25, 50), bars, strict=True):
        assert multiply_adds < found[call] < bar, f"{call}: {found[call]:.1f} slots"
