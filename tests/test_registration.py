"""Every operator has its module, fake, autograd, tests and benchmark, and says what runs it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nvae_fast as nf
from nvae_fast.ops import _backend, _extension
from nvae_fast.ops._op import Operator

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    path.stem
    for path in (ROOT / "nvae_fast" / "ops").iterdir()
    if not path.stem.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").is_file())
)
OPERATORS = sorted(
    schema.name.removeprefix("nvae_fast::")
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("nvae_fast::")
)
PHILOX = {"philox_normal", "philox_words", "split_seed"}  # integers and draws: nothing to differentiate
# Passes that operators and cells are made of, which see to the gradients.
PASSES = {
    "affine_activation", "affine_activation_reduce", "affine_activation_grad", "plane_dots",
    "plane_affine_gradients", "squeeze_excite_gradients",
    "batch_norm_coefficients", "batch_norm_corrections", "merge_planes", "gate_coefficients", "gate_gradients",
    "spectral_lengths", "spectral_gradients", "depthwise_conv2d_affine", "adamax", "winograd_weights", "winograd_conv2d",
    "winograd_conv2d_backward",
}  # fmt: skip
COMPOSED = {"inverted_residual_cell"}  # a function over other operators, no operator itself
# Modules whose operators are kernels that public functions call, with the tests of those functions.
INTERNAL = {
    "adamax": "adamax", "affine_activation": "batch_norm_swish", "spectral_norm": "regularization",
    "sync_batch_norm_swish": "nn_processes", "wide_conv2d": "wide_conv2d", "winograd": "winograd",
}  # fmt: skip


def operators_of(name: str) -> list[Operator]:
    return [
        value
        for value in vars(importlib.import_module(f"nvae_fast.ops.{name}")).values()
        if isinstance(value, Operator) and value.name not in PHILOX
    ]


EVERY_OPERATOR = [operator for name in MODULES for operator in operators_of(name)]


def test_there_are_operator_modules() -> None:
    assert set(MODULES) >= {
        "philox",
        "residual_normal",
        "normal_sample",
        "normal_log_prob",
        "depthwise_conv2d",
        "channel_statistics",
        "batch_norm_swish",
        "elu",
        "plane_affine",
        "squeeze_excite",
        "weight_norm",
        "mixture_logistic",
    }


@pytest.mark.parametrize("name", MODULES)
def test_every_operator_module_is_complete(name: str) -> None:
    assert name in {"philox", "inverted_residual", *INTERNAL} or operators_of(name), (
        f"nvae_fast/ops/{name}.py registers no operator"
    )
    test = ROOT / "tests" / f"test_{INTERNAL.get(name, name)}.py"
    assert test.is_file(), f"{test} is missing"
    benchmark = ROOT / "benchmarks" / "cases" / f"{name}.py"
    assert name in INTERNAL or benchmark.is_file(), f"{benchmark} is missing"
    module = importlib.import_module(f"nvae_fast.ops.{name}")
    assert module.__doc__, "a module begins with its formula"


def test_every_operator_belongs_to_a_module() -> None:
    of_modules = {operator.name for operator in EVERY_OPERATOR} | PHILOX | PASSES
    of_modules |= {f"{name}_backward" for name in of_modules}
    assert set(OPERATORS) <= of_modules


@pytest.mark.parametrize("operator", EVERY_OPERATOR, ids=lambda operator: operator.name)
def test_every_operator_is_registered_in_full(operator: Operator) -> None:
    qualified = f"nvae_fast::{operator.name}"
    overload = getattr(torch.ops.nvae_fast, operator.name).default
    assert operator.overload is overload
    schema = overload._schema
    assert not schema.is_mutable, "ops are functional"
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(qualified, key), f"no {key} kernel"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Autograd"), "no autograd"
    assert torch._library.simple_registry.singleton.find(qualified).fake_impl.kernel is not None, "no fake"


@pytest.mark.parametrize("name", [n for n in OPERATORS if n in PHILOX | PASSES or n.endswith("_backward")])
def test_helper_operators_have_a_fake(name: str) -> None:
    assert torch._library.simple_registry.singleton.find(f"nvae_fast::{name}").fake_impl.kernel is not None


def test_backends_lists_every_op_with_a_kernel_or_a_reason() -> None:
    table = nf.backends()
    assert set(table) == {operator.name for operator in EVERY_OPERATOR} | {"philox"} | COMPOSED
    for op, row in table.items():
        assert set(row) == {"cpu", "cuda"}, op
        for device, backend in row.items():
            known = backend in ("cpp", "triton", "cuda")
            assert known or (backend.startswith("reference (") and len(backend) > len("reference ()")), (
                op,
                device,
                backend,
            )


def test_a_binary_without_cuda_sources_is_the_reason_it_has_no_cuda_kernel() -> None:
    if not _extension.load() or _extension.info()["cuda"]:
        pytest.skip("this extension is absent, or has its CUDA sources")
    reason = nf.backends()["depthwise_conv2d"]["cuda"]
    assert reason.startswith(
        "reference (the C++ extension was built without its CUDA sources (nvcc was not found"
    )


def test_use_backend_works_and_restores() -> None:
    def cpu() -> str:
        return nf.backends()["residual_normal"]["cpu"]

    before = cpu()
    with nf.use_backend("reference"):
        assert cpu().startswith("reference (asked for")
        assert not _backend.fused("residual_normal", torch.device("cpu"))
        with nf.use_backend("auto"):
            assert cpu() == before
        assert _backend.forced_reference()
    assert cpu() == before
    with pytest.raises(KeyError), nf.use_backend("reference"):
        raise KeyError("the choice is restored after an exception too")
    assert not _backend.forced_reference()
    with (
        pytest.raises(
            ValueError, match="use_backend: choice: expected one of 'auto', 'reference', got 'cuda'"
        ),
        nf.use_backend("cuda"),
    ):
        pass
    assert not _backend.forced_reference()


def test_a_call_goes_where_backends_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" runs the operator where a fused kernel is recorded, "reference" never does."""
    calls = []
    (operator,) = operators_of("weight_norm")
    monkeypatch.setattr(operator, "_kernel", lambda *args: calls.append("operator") or args[0])
    monkeypatch.setitem(_backend._fused, ("weight_norm", "cpu"), "cpp")
    weight, norm = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    nf.weight_norm(weight, norm)
    assert calls == ["operator"]
    with nf.use_backend("reference"):
        nf.weight_norm(weight, norm)
    assert calls == ["operator"]


def in_a_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_chooses_the_backend() -> None:
    """And importing initialises neither CUDA nor triton."""
    code = (
        "import sys, torch, nvae_fast; assert 'triton' not in sys.modules;"
        "assert not torch.cuda.is_initialized();"
        "print(nvae_fast.backends()['residual_normal']['cpu'])"
    )
    done = in_a_fresh_process(code, NVAE_FAST_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference (asked for")


def test_environment_is_validated() -> None:
    done = in_a_fresh_process("import nvae_fast", NVAE_FAST_BACKEND="fastest")
    assert done.returncode != 0
    assert "NVAE_FAST_BACKEND: expected one of 'auto', 'reference', got 'fastest'" in done.stderr


def test_without_the_extension_everything_still_runs() -> None:
    code = (
        "import torch, nvae_fast as nf; out = nf.residual_normal(torch.zeros(1, 2, 2, 2), seed=1);"
        "print(float(out.kl)); print(nf.backends()['residual_normal']['cpu'])"
    )
    done = in_a_fresh_process(code, NVAE_FAST_DISABLE_EXTENSION="1", NVAE_FAST_BACKEND="")
    assert done.returncode == 0, done.stderr
    kl, backend = done.stdout.splitlines()
    assert float(kl) == 0.0
    assert backend.startswith("reference (")
    assert "disabled" in backend
