"""Which GPU runs which kernels: decided for each device, asked once, and said. No GPU is needed: the queries are replaced."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nvae_fast as nf
from nvae_fast import cli
from nvae_fast.ops import _backend, _devices, _extension, depthwise_conv2d, philox
from nvae_fast.ops.inverted_residual import train as inverted_residual

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ["sm_80", "sm_90a", "sm_100", "compute_100"]
T4, V100, A100, H100, RTX5090 = (7, 5), (7, 0), (8, 0), (9, 0), (12, 0)
# For as long as the process: once an operator is gone, PyTorch stumbles over its name wherever it goes through all of them.
LIBRARY = torch.library.Library("nvae_fast_devices", "FRAGMENT")
Machine = Callable[..., Counter[int]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Installs GPUs of the given compute capabilities, and kernels for all ops; returns how often each GPU was asked."""

    def install(*capabilities: tuple[int, int], archs: list[str] = ARCHS) -> Counter[int]:
        asked: Counter[int] = Counter()

        def capability(index: int) -> tuple[int, int]:
            asked[index] += 1
            return capabilities[index]

        monkeypatch.setattr(_devices, "_refusals", {})
        monkeypatch.setattr(_extension, "cuda_archs", lambda: archs)
        queries = SimpleNamespace(
            is_available=lambda: bool(capabilities),
            device_count=lambda: len(capabilities),
            current_device=lambda: 0,
            get_device_capability=capability,
            get_device_name=lambda index: f"GPU model {index}",
        )
        monkeypatch.setattr(_devices, "cuda", queries)
        for op in nf.backends():
            kind = "cuda" if op in ("depthwise_conv2d", "inverted_residual_cell") else "triton"
            monkeypatch.setitem(_backend._fused, (op, "cuda"), kind)
            monkeypatch.setitem(
                _backend._kinds, op, ("cuda", "triton") if op == "inverted_residual_cell" else (kind,)
            )
        asked.clear()
        _devices._refusals.clear()
        return asked

    return install


def cuda(index: int) -> torch.device:
    return torch.device("cuda", index)


@pytest.mark.parametrize(
    "architecture, on, off",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("sm_100a", [(10, 0)], [(10, 3), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("compute_80", [(8, 0), (8, 6), (9, 0), (12, 1)], [(7, 5)]),
        ("compute_100", [(10, 0), (11, 0), (12, 0)], [(9, 0)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("other", [], [(8, 0)]),
    ],
)
def test_what_code_runs_where(
    architecture: str, on: list[tuple[int, int]], off: list[tuple[int, int]]
) -> None:
    assert [_devices.covers(architecture, capability) for capability in on] == [True] * len(on)
    assert [_devices.covers(architecture, capability) for capability in off] == [False] * len(off)


@pytest.mark.parametrize(
    "capability, archs, triton, compiled",
    [
        (T4, ARCHS, False, False),
        (V100, ARCHS, False, False),
        (A100, ARCHS, True, True),
        ((8, 9), ARCHS, True, True),
        (H100, ARCHS, True, True),
        (RTX5090, ARCHS, True, True),  # from PTX
        (RTX5090, ["sm_80", "sm_90a"], True, False),
        (A100, ["sm_90a"], True, False),
        (T4, ["sm_75", "compute_75"], False, True),
    ],
)
def test_kinds_of_kernels_by_capability(
    capability: tuple[int, int], archs: list[str], triton: bool, compiled: bool, machine: Machine
) -> None:
    machine(capability, archs=archs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _backend.fused("residual_normal", cuda(0)) is triton
        assert _backend.fused("depthwise_conv2d", cuda(0)) is compiled
        assert inverted_residual.available(cuda(0)) is (triton and compiled)


def test_unlike_gpus_each_asked_once_and_said_once(machine: Machine) -> None:
    asked = machine(A100, T4, RTX5090)
    assert not asked, "nothing is asked before it is needed"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            for op in ("depthwise_conv2d", "residual_normal", "inverted_residual_cell"):
                assert [_backend.fused(op, cuda(index)) for index in range(3)] == [True, False, True], op
    (warning,) = seen
    assert str(warning.message) == (
        "nvae_fast: cuda:1 (GPU model 1, compute capability 7.5): Triton supports compute capability 8.0 and newer; the CUDA "
        f"kernels were compiled for sm_80, sm_90a, sm_100, compute_100 only. {_devices.LOST}"
    )
    assert asked == {0: 1, 1: 2, 2: 1}, "once more for the name in the warning"


def test_a_call_goes_where_its_device_says(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Public functions by the device of their tensors; these hold no data, so that no GPU is needed."""
    calls: list[str] = []
    op = depthwise_conv2d._op
    monkeypatch.setattr(op, "_kernel", lambda *args: calls.append("operator") or [args[0]] * 3)
    monkeypatch.setattr(op, "formula", lambda *args: calls.append("reference") or [args[0]] * 3)
    with FakeTensorMode():
        tensors = [
            (torch.empty(1, 4, 8, 8, device=cuda(i)), torch.empty(4, 1, 5, 5, device=cuda(i)))
            for i in range(2)
        ]
    machine(A100, T4)
    for x, weight in tensors:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nf.depthwise_conv2d(x, weight)
    assert calls == ["operator", "reference"]


def test_operators_called_directly_fall_back_too(machine: Machine) -> None:
    """The passes of a cell and the noise reach the dispatcher without asking for a backend."""

    def launcher(*args: Any) -> str:
        return "launched"

    def formula(*args: Any) -> str:
        return "formula"

    with FakeTensorMode():
        new, old = (torch.empty(3, device=cuda(i)) for i in range(2))
    machine(A100, T4)
    kernel = _devices.by_device(launcher, formula)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert kernel(new, 1) == kernel((2, 3), new) == kernel([new], []) == kernel(None, [new]) == "launched"
        assert kernel(old, 1) == kernel((2, 3), old) == kernel([old], []) == kernel(None, [old]) == "formula"
        assert kernel(torch.tensor(1), old) == "formula", "a seed on the CPU says nothing"
        assert depthwise_conv2d.kernels(cuda(0)) is depthwise_conv2d._ON_GPU
        assert depthwise_conv2d.kernels(cuda(1)) == (
            depthwise_conv2d._reference,
            depthwise_conv2d._backward_formula,
        )


def test_every_triton_launcher_is_registered_with_its_formula() -> None:
    """All of them through `by_device`: a launcher registered by itself would start on a GPU that Triton does not support."""
    lines = [
        line.strip()
        for page in (ROOT / "nvae_fast").rglob("*.py")
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.search(r'\bimpl\(.*"CUDA"', line)
    ]
    assert lines
    assert [line for line in lines if "_devices.by_device(" not in line] == []


def test_the_fallback_computes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the dispatcher, where the CPU plays the old GPU."""
    machine(T4)
    monkeypatch.setattr(_devices, "_device", lambda args: 0)
    LIBRARY.define("normal(SymInt[] size, Tensor seed, ScalarType dtype, bool channels_last) -> Tensor")
    launched: list[Any] = []
    LIBRARY.impl("normal", _devices.by_device(launched.append, philox._normal_reference), "CPU")
    args = ([2, 3, 4, 4], torch.tensor(5), torch.float32, True)
    with pytest.warns(UserWarning, match=r"cuda:0 \(GPU model 0, compute capability 7\.5\)"):
        z = torch.ops.nvae_fast_devices.normal(*args)
    assert torch.equal(z, philox._normal_reference(*args))
    assert not launched


def test_backends_and_info_say_it(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine(A100, T4)
    table = nf.backends()
    reason = "GPU model 1, compute capability 7.5: "
    triton = f"reference ({reason}Triton supports compute capability 8.0 and newer)"
    assert table["residual_normal"]["cuda"] == "triton"
    assert table["residual_normal"]["cuda:1"] == triton
    compiled = (
        f"reference ({reason}the CUDA kernels were compiled for sm_80, sm_90a, sm_100, compute_100 only)"
    )
    assert table["depthwise_conv2d"] | {"cpu": ""} == {"cpu": "", "cuda": "cuda", "cuda:1": compiled}
    assert "cuda:0" not in table["depthwise_conv2d"]
    assert list(_backend.missing())[-1] == "cuda:1"
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"    cuda:1 {triton}" in lines
    (line,) = [line for line in lines if line.startswith("  cuda:1 ")]
    assert _devices.LOST in line

    machine(T4)
    table = nf.backends()
    assert table["residual_normal"]["cuda"] == triton.replace("model 1", "model 0")
    assert set(table["residual_normal"]) == {"cpu", "cuda"}
    with nf.use_backend("reference"):
        assert nf.backends()["residual_normal"]["cuda"].startswith("reference (asked for")

    machine(A100, archs=["sm_90a"])
    assert nf.backends()["depthwise_conv2d"]["cuda"].endswith(
        "compiled for sm_90a only; rebuild with NVAE_FAST_CUDA_ARCHS=sm_80)"
    )

    machine(A100, H100)
    assert set(nf.backends()["residual_normal"]) == {"cpu", "cuda"}
    assert "cuda:0" not in _backend.missing()


@pytest.mark.parametrize("index, expected", [(0, 2.0), (1, 0.0)])
def test_compilers_take_the_answer_for_a_constant(index: int, expected: float, machine: Machine) -> None:
    machine(A100, T4)
    device = cuda(index)
    torch.compiler.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def decide(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _backend.fused("residual_normal", device) else x - 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decide(torch.ones(1)).item() == expected


def test_tensors_without_data_need_no_gpu(machine: Machine) -> None:
    """Tracing for a GPU on a machine without one."""
    machine()
    assert _backend.fused("residual_normal", cuda(0))


def test_importing_asks_no_device() -> None:
    code = (
        "import torch\n"
        "def asked(*args): raise AssertionError('a GPU was asked')\n"
        "torch.cuda.get_device_capability = torch.cuda.get_device_properties = torch.cuda.is_available = asked\n"
        "import nvae_fast, nvae_fast.cli\n"
        "nvae_fast.residual_normal(torch.zeros(1, 4, 2, 2), seed=3)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
