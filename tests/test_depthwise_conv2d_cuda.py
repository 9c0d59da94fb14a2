"""The CUDA kernels of depthwise_conv2d without a GPU: run on the CPU by a stand-in for CUDA (tests/cuda_shim), and
compiled by nvcc with registers counted. With a GPU the operators themselves are tested too."""

from __future__ import annotations

from typing import Any

import aot
import cuda_shim
import pytest
import torch
from harness import assert_close, relative_error

from nvae_fast.ops import depthwise_conv2d as room

FAST = (torch.float32, torch.bfloat16, torch.float16)
ROOM = (1, 1, 1)
STEPS = {"plain": ROOM, "stride": (2, 1, 1), "up": (1, 1, 2)}
DILATED = {"dilated": (1, 2, 1), "both": (2, 2, 1), "up dilated": (1, 2, 2)}
VECTORS = ("scale", "shift", "alpha", "beta", "gamma", "pivot")
GRADIENTS = ("x", "weight", "scale", "shift")


def inputs(kernel: int, size: tuple[int, ...], dtype: torch.dtype, step: tuple[int, int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    b, c, h, w = size
    stride, dilation, upsample = step
    out = (b, c, cuda_shim.extent(h, stride, upsample), cuda_shim.extent(w, stride, upsample))
    t = {"x": normal(*size), "weight": normal(c, 1, kernel, kernel), "grad": normal(*out), "out": normal(*out)}
    t = {name: value.to(dtype) for name, value in t.items()}
    wide = cuda_shim.accumulate(dtype)
    return t | {name: normal(c).to(wide) for name in VECTORS}


def truth(t: dict[str, Any], step: tuple[int, int, int], activation: str | None, taps: Any = None) -> dict:
    """Outputs and gradients of the room's formula in float64, of the same inputs."""
    wide = {name: v.double() for name, v in t.items() if v is not None}
    leaves = {n: wide[n].requires_grad_() for n in GRADIENTS if n in wide}
    weight = leaves["weight"]
    if taps is not None:
        mask = torch.zeros(weight.shape[-1] ** 2, dtype=torch.float64)
        mask[taps] = 1
        weight = weight * mask.view(weight.shape[-2:])
    y, mean, m2 = room._reference(
        leaves["x"], weight, leaves.get("scale"), leaves.get("shift"), *step, activation, True
    )[:3]
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
) -> dict:
    common = (t["x"], t["weight"], t.get("scale"), t.get("shift"), *step, activation)
    y, mean, m2 = cuda_shim.forward(*common, True, taps, channels_last)
    extra = {n: t[n] for n in ("out", "alpha", "beta", "gamma", "pivot") if n in t}
    gradients = cuda_shim.backward(t["grad"], *common, taps, channels_last, **extra)
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
@pytest.mark.parametrize("step", STEPS | DILATED)
@pytest.mark.parametrize("kernel", [3, 5, 7, 11])
def test_fast_kernels(kernel: int, step: str, dtype: torch.dtype) -> None:
    """Vectors and their absence (40 channels), several tiles of columns and strips of rows, images that share a block."""
    activation = {3: None, 5: "swish", 7: "elu", 11: "swish"}[kernel]
    steps = (STEPS | DILATED)[step]
    for size in ((2, 40, 9, 7), (1, 3, 18, 21), (3, 8, 4, 5)):
        t = inputs(kernel, size, dtype, steps)
        compare(kernels(t, steps, activation), truth(t, steps, activation), dtype)
