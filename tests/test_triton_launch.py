"""Every Triton kernel passes through the code that Triton generates to bind the arguments of a launch, which neither the
interpreter nor ahead-of-time compilation runs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

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
