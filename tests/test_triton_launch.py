"""Every Triton kernel passes through the code that Triton generates to bind the arguments of a launch, which neither the
interpreter nor ahead-of-time compilation runs; and what Triton specialises in calls that should share a binary."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from launches import Launch, bound, recorded

import nvae_fast.kernels

triton = pytest.importorskip("triton")


def kernels() -> Iterator[tuple[str, Any]]:
    """Every ``@triton.jit`` function that is launched, by its name in its module."""
    for info in pkgutil.iter_modules(nvae_fast.kernels.__path__):
        module = importlib.import_module(f"nvae_fast.kernels.{info.name}")
        for name, value in vars(module).items():
            own = inspect.getmodule(getattr(value, "fn", None)) is module
            if own and isinstance(value, triton.runtime.JITFunction) and name.endswith("kernel"):
                yield f"{info.name}.{name}", value


KERNELS = dict(kernels())


def cuda_backend() -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget("cuda", 90, 32))


def reserved_names() -> set[str]:
    """Names that no argument may have: those that the generated binder uses for itself, the parameters of the method that
    calls it, and the options of a launch."""
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = cuda_backend()
    binder = create_function_from_signature(inspect.Signature(), [], backend)
    return {
        *binder.__code__.co_varnames,
        *(name for name in binder.__globals__ if not name.startswith("__")),
        *inspect.signature(JITFunction.run).parameters,
        *vars(backend.parse_options({})),
    }


def test_every_kernel_is_found() -> None:
    assert len(KERNELS) >= 25, sorted(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_launches_bind(name: str) -> None:
    from triton.runtime.jit import create_function_from_signature

    kernel = KERNELS[name]
    arguments = {p.name: 1 if p.is_constexpr else torch.zeros(16) for p in kernel.params}
    binder = create_function_from_signature(kernel.signature, kernel.params, cuda_backend())
    bound, specialization, options = binder(*arguments.values(), num_warps=4)
    assert bound == arguments
    assert len(specialization) == len(arguments)
    assert options == {"num_warps": 4}


@pytest.mark.parametrize("name", KERNELS)
def test_no_argument_has_a_reserved_name(name: str) -> None:
    assert not reserved_names().intersection(KERNELS[name].arg_names)


def test_reserved_names_are_what_breaks_a_launch() -> None:
    assert {
        "params",
        "specialization",
        "options",
        "specialize_impl",
        "backend",
        "grid",
        "warmup",
        "num_warps",
    } <= (reserved_names())


# Specialisation: a CUDA graph under capture may not load a kernel, so calls alike must need the same ones.


def binaries(launches: list[Launch]) -> list[Any]:
    """What Triton looks a compiled kernel up by."""
    backend = cuda_backend()
    found = []
    for launch in launches:
        arguments, specialization, options = bound(launch, backend)
        constants = {p.name: arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
        found.append((launch.name, specialization, options, constants))
    return found


def empty(*size: int, dtype: torch.dtype = torch.float32, last: bool = True) -> torch.Tensor:
    memory_format = torch.channels_last if last and len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)


def calls(b: int, seed: torch.Tensor, last: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every launcher with a batch of b samples: module.function, arguments."""
    big, z = empty(b, 40, 64, 64, last=last), empty(b, 20, 64, 64, last=last)
    sums = [empty(b, 20) for _ in range(3)]
    rest = (None, seed, True, 5.0, 0.01)
    yield "residual_normal.residual_normal", (big, big, *rest)
    yield "residual_normal.residual_normal_backward", (z, *sums, big, big, *rest, True, True, False)
    yield "normal_sample.normal_sample", (big, None, seed, 0.7, 5.0, 0.01)
    yield "normal_sample.normal_sample_backward", (z, big, None, seed, 0.7, 5.0, 0.01, True, False)
    yield "normal_log_prob.normal_log_prob", (z, big, 5.0, 0.01)
    yield "normal_log_prob.normal_log_prob_backward", (sums[0], z, big, 5.0, 0.01, True, True)
    params, x = empty(b, 100, 32, 32, last=last), empty(b, 3, 32, 32, last=last)
    yield "mixture_logistic.mixture_logistic_log_prob", (params, x, 10, 8)
    backward = (empty(b, 32, 32), params, x, 10, 8)
    yield "mixture_logistic.mixture_logistic_log_prob_backward", backward
    yield "mixture_logistic.mixture_logistic_sample", (params, seed, 10, 0.7)
    yield "mixture_logistic.mixture_logistic_mean", (params, 10)
    y = empty(b, 128, 16, 16, last=last)
    v, rows = empty(128), empty(b, 128)
    yield "affine_activation.affine_activation", (y, v, v, "swish")
    yield "affine_activation.affine_activation_reduce", (y, y, v, v, v, "swish", True, True)
    yield "affine_activation.affine_activation_grad", (y, y, v, v, v, v, v, "swish")
    yield "channel_statistics.channel_statistics", (y, True)
    yield "plane_affine.plane_affine", (y, rows, y, rows, rows)
    yield "plane_affine.plane_dots", (y, y, v)


def recorded_calls(b: int, seed: torch.Tensor, last: bool) -> dict[str, list[Launch]]:
    found = {}
    for name, args in calls(b, seed, last):
        module, function = name.split(".")
        launcher = getattr(importlib.import_module(f"nvae_fast.kernels.{module}"), function)
        found[name] = recorded(launcher, *args)
        assert found[name], name
    return found


@pytest.mark.parametrize("last", [True, False])
def test_the_place_of_a_seed_needs_no_other_binary(last: bool) -> None:
    """Seeds are elements of one tensor: 16 bytes divide the address of every other one."""
    seeds = torch.zeros(2, dtype=torch.int64)
    first, second = (recorded_calls(64, seed, last) for seed in seeds)
    for name, launches in first.items():
        assert binaries(launches) == binaries(second[name]), name
    philox = importlib.import_module("nvae_fast.kernels.philox")
    for size, odd in (((4, 20, 8, 8), False), ((4, 20, 7, 9), True), ((100,), False)):
        each = [
            binaries(recorded(philox.philox_normal, size, s, torch.float32, odd or len(size) == 4))
            for s in seeds
        ]
        assert each[0] == each[1]


@pytest.mark.parametrize("last", [True, False])
def test_another_batch_needs_no_other_binary(last: bool) -> None:
    """The last batch of an epoch is smaller: where it takes the same tile, it takes the same binary."""
    seed = torch.zeros((), dtype=torch.int64)
    most, other = (recorded_calls(b, seed, last) for b in (64, 63))
    same = 0
    for name, launches in most.items():
        for one, two in zip(binaries(launches), binaries(other[name]), strict=True):
            if one[3] == two[3]:
                assert one == two, name
                same += 1
    assert same >= 14, same
