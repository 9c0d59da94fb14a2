"""The Triton kernels for noise, mixtures and planes compiled ahead of time for sm_80, sm_90 and sm_100, as launched."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import Launch, binary, recorded

pytest.importorskip("triton")

CAPABILITIES = (80, 90, 100)
FORMATS = {"rows": torch.contiguous_format, "channels": torch.channels_last}
Case = tuple[str, Callable[..., Any], list[Any]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def empty(size: tuple[int, ...], layout: str = "rows", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    memory_format = FORMATS[layout] if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)


def seed() -> torch.Tensor:
    return empty((), dtype=torch.int64)


def noise_cases() -> Iterator[Case]:
    kernels = importlib.import_module("nvae_fast.kernels.philox")
    wide = (2**21, 20, 7, 9)  # 64-bit offsets
    yield "flat", kernels.philox_normal, [(2**20,), seed(), torch.float32, False]
    yield "quads", kernels.philox_normal, [(8, 20, 16, 16), seed(), torch.bfloat16, True]
    yield "odd", kernels.philox_normal, [wide, seed(), torch.float16, True]
    yield "words", kernels.philox_words_of, [seed(), 1000, 2**32, 0]


def mixture_cases() -> Iterator[Case]:
    """Ten components of 32x32 pixels; with 5 bits a bin is far wider than the smallest scales."""
    kernels = importlib.import_module("nvae_fast.kernels.mixture_logistic")
    for layout, dtype in (("rows", torch.float32), ("channels", torch.bfloat16)):
        params, x = empty((16, 100, 32, 32), layout, dtype), empty((16, 3, 32, 32), layout, dtype)
        bits = 5 if layout == "channels" else 8
        yield f"log_prob {layout}", kernels.mixture_logistic_log_prob, [params, x, 10, bits]
        backward = [empty((16, 32, 32)), params, x, 10, bits]
        yield f"backward {layout}", kernels.mixture_logistic_log_prob_backward, backward
        yield f"sample {layout}", kernels.mixture_logistic_sample, [params, seed(), 10, 0.7]
        yield f"mean {layout}", kernels.mixture_logistic_mean, [params, 10]


def plane_cases() -> Iterator[Case]:
    bn = importlib.import_module("nvae_fast.kernels.affine_activation")
    cs = importlib.import_module("nvae_fast.kernels.channel_statistics")
    pa = importlib.import_module("nvae_fast.kernels.plane_affine")
    for dtype in (torch.float32, torch.bfloat16):
        for layout, activation in (("rows", "swish"), ("channels", "elu")):
            # In rows 64-bit offsets, for float32.
            wide = layout == "rows" and dtype == torch.float32
            size = (2**17 if wide else 64, 128, 16, 16)
            x, y, grad = (empty(size, layout, dtype) for _ in range(3))
            v = [empty((128,)) for _ in range(5)]
            a, b, c = (empty(size[:2]) for _ in range(3))
            name = f"{layout} {dtype}"
            yield f"statistics {name}", cs.channel_statistics, [x, False]
            yield f"activation {name}", bn.affine_activation, [x, *v[:2], activation]
            reduce = [grad, x, *v[:3], activation, True, True]
            yield f"reduce {name}", bn.affine_activation_reduce, reduce
            yield f"gradient {name}", bn.affine_activation_grad, [grad, x, *v, activation]
            yield f"affine {name}", pa.plane_affine, [x, a, y, b, c]
            yield f"dots {name}", pa.plane_dots, [x, y, v[0]]
            if layout == "channels":
                turned = empty(size, "rows", dtype)
                yield f"affine mixed {dtype}", pa.plane_affine, [x, a, turned, b, c]
                yield f"dots mixed {dtype}", pa.plane_dots, [x, turned, v[0]]


def weight_norm_cases() -> Iterator[Case]:
    kernels = importlib.import_module("nvae_fast.kernels.weight_norm")
    for out in (torch.float32, torch.bfloat16):
        sizes = [(64, 32, 3, 3), (128, 1, 5, 5)]
        weights, masks = ([torch.empty(size) for size in sizes] for _ in range(2))
        norms = [torch.empty(size[0], 1, 1, 1) for size in sizes]
        yield f"forward {out}", kernels.weight_norm, [weights, norms, masks, 1e-5, out]
        grads = [torch.empty(size, dtype=out) for size in sizes]
        yield (
            f"backward {out}",
            kernels.weight_norm_backward,
            [grads, weights, norms, masks, 1e-5, True, True],
        )


def named(cases: Iterator[Case]) -> Any:
    found = list(cases)
    return pytest.mark.parametrize("index", range(len(found)), ids=[name for name, *_ in found])


def launches_of(cases: Iterator[Case], index: int) -> list[Launch]:
    _, launcher, args = list(cases)[index]
    return recorded(launcher, *args)


def in_turn(index: int) -> int:
    return CAPABILITIES[(index + index // 3) % 3]


@pytest.mark.parametrize("capability", CAPABILITIES)
@named(noise_cases())
def test_noise(index: int, capability: int) -> None:
    (launch,) = launches_of(noise_cases(), index)
    found = binary(launch, capability)
    assert found.stack_bytes == 0
    assert found.registers <= 64, (
        found.registers
    )  # full occupancy with 1024 threads a multiprocessor and more
    # An approximate logarithm or square root would lose the digits that make backends agree. A reciprocal square root is
    # refined.
    assert set(re.findall(r"\w+\.approx", found.ptx)) <= {"rsqrt.approx"}
    if launch.name == "normal_kernel":
        assert "st.global.v4.b32" in found.ptx  # 16 bytes a store
        # A round takes two products of 64 bits, an instruction each; the first round multiplies a zero. Two blocks a thread.
        assert found.count(r"IMAD\.WIDE\.U32") >= 2 * 17
        assert found.count(r"IMAD\.HI") == 0
        assert found.count(r"^BSSY|^CALL") == 0, "no branches"


@named(mixture_cases())
def test_mixtures(index: int) -> None:
    """The three architectures in turn."""
    (launch,) = launches_of(mixture_cases(), index)
    found = binary(launch, in_turn(index))
    assert found.stack_bytes == 0
    assert found.registers <= 128, found.registers
    assert found.shared_bytes == 0, "nothing moves between threads"


@named(plane_cases())
def test_planes(index: int) -> None:
    """The architectures take turns; registers for at least 16 warps on a multiprocessor."""
    for launch in launches_of(plane_cases(), index):
        found = binary(launch, in_turn(index))
        assert found.stack_bytes == 0
        assert found.registers <= 128, found.registers
        assert "atom" not in found.ptx, "sums are added in a fixed order"
        if launch.name not in ("merge_kernel", "sum_chunks_kernel"):
            assert ".f64" not in found.ptx, "nothing over maps is computed in double precision"


@pytest.mark.parametrize("capability", CAPABILITIES)
@named(weight_norm_cases())
def test_weight_norm(index: int, capability: int) -> None:
    """The kernels and the one that writes their tables of addresses."""
    for launch in launches_of(weight_norm_cases(), index):
        found = binary(launch, capability)
        assert found.stack_bytes == 0
        assert found.registers <= 96, "five programs of 128 threads to a multiprocessor"
        assert "atom" not in found.ptx, "sums are added in a fixed order"
