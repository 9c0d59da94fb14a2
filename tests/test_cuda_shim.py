"""The CPU stand-in for CUDA itself: it names what a kernel does wrong, and misses no barrier of the real kernels."""

from __future__ import annotations

import ctypes
import re
import shutil
from functools import cache
from typing import NamedTuple

import cuda_shim
import pytest
import torch
from test_depthwise_conv2d_cuda import inputs, kernels

TOYS = re.findall(r"^  (k\w+),$", (cuda_shim.HERE / "toys.cpp").read_text(), re.MULTILINE)
WRONG = {
    "kNoBarrier": "RAW race",
    "kWriteAfterRead": "WAR race",
    "kWriteTwice": "WAW race",
    "kBlocksWriteTwice": "WAW race",
    "kNoWarpBarrier": "RAW race",
    "kMisalignedShared": "misaligned: writes 8 bytes at byte 4 of 512 of dynamic shared memory",
    "kMisalignedGlobal": "misaligned: reads 16 bytes at byte 8 of 256 of in",
    "kMisalignedCopy": "misaligned: reads 16 bytes at byte 8 of 256 of in",
    "kPastShared": "out of bounds: writes 4 bytes at byte 512 of 512 of dynamic shared memory",
    "kBeforeShared": "out of bounds: writes 4 bytes at byte -4 of 512 of dynamic shared memory",
    "kPastInput": "out of bounds: reads 4 bytes at byte 256 of 256 of in",
    "kBeforeInput": "out of bounds: reads 4 bytes at byte -4 of 256 of in",
    "kPastResult": "out of bounds: writes 4 bytes at byte 512 of 512 of out",
    "kWriteInput": "out of bounds: writes 4 bytes at byte",
    "kUninitialisedResult": "uninitialised: reads 4 bytes at byte",
    "kCopyNotWaitedFor": "cp.async before its wait",
    "kCopyOfTooYoungGroup": "cp.async before its wait",
    "kCopyOfOthers": "RAW race",
    "kCopyOverRead": "WAR race: starts to copy 4 bytes",
    "kThreadEnds": "divergence",
    "kOtherBarrier": "divergence",
    "kLaneMissing": "divergence",
}


@cache
def toys() -> ctypes.CDLL:
    return cuda_shim.build(cuda_shim.HERE / "toys.cpp")


def toy(name: str, shared: int = 512, device: int = 0) -> torch.Tensor:
    memory = cuda_shim.Memory(toys())
    given = memory.given("in", torch.arange(64.0))
    out = memory.fresh("out", (128,), torch.float32)
    pointers = (ctypes.c_void_p(given), ctypes.c_void_p(out.data_ptr()))
    cuda_shim.launched(toys(), toys().toy_launch(TOYS.index(name), 2, shared, device, *pointers))
    return out


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", TOYS)
def test_toys(name: str, seed: int) -> None:
    toys().shim_seed(seed)
    i = torch.arange(128) % 64
    right = {
        "kBarriers": ((i + 32) % 64 ^ 1).float(),
        "kShuffles": 496.0
        + 1024 * (i // 32)
        + 1e3 * (i % 32 // 8 * 8 + 3)
        + 1e5 * (i % 32 + 1).clamp(max=31),
        "kCopyGroups": i.float(),
        "kUninitialised": torch.full((128,), torch.nan),
    }
    if name in right:
        torch.testing.assert_close(toy(name), right[name], rtol=0, atol=0, equal_nan=True)
        return
    with pytest.raises(cuda_shim.Failure) as failure:
        toy(name)
    kind, _, rest = WRONG[name].partition(": ")
    where = r": toy, block \(\d, 0, 0\) thread \d+ "
    assert re.search(re.escape(kind) + where + ".*" + re.escape(rest), str(failure.value)), failure.value
    if kind != "divergence" and shutil.which("addr2line"):
        line = re.search(r"\[toys\.cpp:(\d+)\]", str(failure.value))
        assert line is not None, failure.value


def test_warps_run_in_other_orders() -> None:
    """What a race leaves behind is not the same for all seeds."""
    left = set()
    for seed in range(8):
        memory = cuda_shim.Memory(toys())
        given, out = memory.given("in", torch.arange(64.0)), memory.fresh("out", (128,), torch.float32)
        toys().shim_seed(seed)
        pointers = (ctypes.c_void_p(given), ctypes.c_void_p(out.data_ptr()))
        toys().toy_launch(TOYS.index("kNoBarrier"), 2, 512, 0, *pointers)
        left.add(tuple(out.isnan().tolist()))
        assert "RAW race" in cuda_shim.reports(toys())
    assert len(left) > 2


def test_limits_of_shared_memory() -> None:
    """As a GPU: without asking 48 KB, with asking what it has, and no byte more."""
    for device, most in enumerate(cuda_shim.DEVICES.values()):
        toy("kBarriers", most, device)
        with pytest.raises(cuda_shim.Failure, match=f"asks for {most + 1} of {most} bytes"):
            toy("kBarriers", most + 1, device)
        optin, multiprocessor, reserved = 97, 81, 111  # cudaDevAttr...
        assert toys().toy_attribute(optin, device) == most
        assert toys().toy_attribute(multiprocessor, device) == most + 1024
        blocks = toys().toy_occupancy(device, 128, most // 3 - toys().toy_attribute(reserved, device))
        assert blocks == 3
    assert toys().toy_attribute(optin, cuda_shim.T4 + 1) == -1
    assert toys().toy_launch_unasked(48 * 1024 + 1) != 0
    assert "asks for 49153 of 49152 bytes" in cuda_shim.reports(toys())


# Each with what may show it: kernel, step, size, channels_last. Weights of 11x11 kernels reach past a narrow tile.
CASES = (
    (5, "plain", (3, 40, 9, 7), True),
    (11, "plain", (1, 32, 16, 4), True),
    (11, "stride", (1, 32, 16, 4), True),
    (3, "up", (1, 5, 4, 4), True),
    (9, "plain", (1, 2, 6, 5), False),
)
MASKED = (5, "plain", (1, 32, 6, 5), True)  # with taps that no kernel is compiled for
BARRIERS = [
    (path.name, line)
    for path in sorted((cuda_shim.ROOT / "csrc" / "cuda").glob("depthwise_conv2d*.cu*"))
    for line, text in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads()" in text
]


def found(offset: int = 0) -> str:
    """The first report that a case brings, or nothing."""
    with cuda_shim.using(mutants()):
        for kernel, step, size, channels_last in (*CASES, MASKED):
            t = inputs(kernel, size, torch.float32, cuda_shim.STEPS[step])
            taps = [0, 7, 24] if (kernel, step, size, channels_last) == MASKED else None
            try:
                kernels(t, cuda_shim.STEPS[step], "swish", taps, channels_last, offset=offset)
            except cuda_shim.Failure as failure:
                return str(failure)
    return ""


@pytest.mark.parametrize("offset", [0, 1])
def test_nothing_is_found_in_the_kernels_as_they_are(offset: int) -> None:
    assert not found(offset)


@pytest.mark.parametrize("name, line", BARRIERS, ids=[f"{name}:{line}" for name, line in BARRIERS])
def test_a_missing_barrier_is_found(name: str, line: int) -> None:
    """Where nothing is found, the barrier is needless or a case is missing above."""
    mutants().shim_remove_barrier(name.encode(), line)
    try:
        assert re.search("RAW race|WAR race|WAW race", found())
    finally:
        mutants().shim_remove_barrier(b"", 0)


def test_a_missing_wait_for_copies_is_found() -> None:
    mutants().shim_ignore_waits(1)
    try:
        assert "cp.async before its wait" in found()
    finally:
        mutants().shim_ignore_waits(0)


class Mutation(NamedTuple):
    file: str
    pattern: str
    replacement: str  # N: the mutation's number
    report: str
    offset: int = 0


MUTATIONS = {
    "every pointer counts as aligned": Mutation(
        "depthwise_conv2d_launch.cuh",
        r"(inline bool aligned\([^)]*\) \{\s*return )(.*?);",
        r"\1shim_mutated(N) || (\2);",
        "misaligned",
        offset=1,
    ),
    "a quarter of the shared memory is missing": Mutation(
        "depthwise_conv2d_launch.cuh",
        r"(NVAE_LAUNCH\(.*?), shared, stream",
        r"\1, shim_mutated(N) ? shared / 4 * 3 : shared, stream",
        "out of bounds: .* of dynamic shared memory",
    ),
    "one channel too many": Mutation(
        "depthwise_conv2d_*.cuh",
        r"(static_cast<int>\(channels - first\))( : kLanes;)",
        r"\1 + shim_mutated(N)\2",
        "out of bounds: .*",
    ),
    "small tensors are read one element further": Mutation(
        "elements.cuh",
        r"(return static_cast<S>\(static_cast<const \w+\*>\(data\)\[)i\]",
        r"\1i + shim_mutated(N)]",
        "out of bounds: .* reads 4 bytes at byte .* of weight",
    ),
    "y is written one element further": Mutation(
        "depthwise_conv2d_forward.cuh",
        r"(static_cast<char\*>\(a\.p\.y\))",
        r"(\1 + sizeof(Bits) * shim_mutated(N))",
        "out of bounds: .* writes .* of y|misaligned: .* of y",
    ),
}


@cache
def mutants() -> ctypes.CDLL:
    """A build in which each mutation can be switched on."""
    folder = cuda_shim.temporary_folder() / "csrc"
    shutil.copytree(cuda_shim.ROOT / "csrc", folder)
    for number, (name, m) in enumerate(MUTATIONS.items(), 1):
        count = 0
        for path in (folder / "cuda").glob(m.file):
            text, here = re.subn(m.pattern, m.replacement.replace("N", str(number)), path.read_text())
            path.write_text(text)
            count += here
        assert count, f"{name}: the pattern matches nothing any more"
    return cuda_shim.build(cuda_shim.HERE / "depthwise_conv2d.cpp", folder, "-DSHIM_FLOAT_ONLY")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_kernel_is_found(name: str) -> None:
    mutants().shim_mutate(list(MUTATIONS).index(name) + 1)
    try:
        assert re.search(MUTATIONS[name].report, found(MUTATIONS[name].offset))
    finally:
        mutants().shim_mutate(0)
