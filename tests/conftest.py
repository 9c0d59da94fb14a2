"""Test settings that every file shares."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from internals import use_operators

import nvae_fast as nf

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# Where Triton is not installed, the folder tests/triton is no substitute: Python would take it for a namespace package.
_triton = importlib.util.find_spec("triton")
if _triton is not None and _triton.origin is None:
    sys.modules["triton"] = None  # type: ignore[assignment]

# A shell that runs the tests in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two test processes on two cores: more threads than that only get in each other's way.
if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test whose `device` is a GPU, so that `-m gpu` selects what needs one; skip those without a GPU."""
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("device") == "cuda":
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["contiguous", "channels_last"])
def memory_format(request: pytest.FixtureRequest) -> torch.memory_format:
    return {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[request.param]


@pytest.fixture(params=["operator", "reference"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A test's ops run once as operators (the fused kernels where there are any, with the operators' own
    autograd) and once as plain PyTorch."""
    if request.param == "reference":
        with nf.use_backend("reference"):
            yield request.param
    else:
        use_operators(monkeypatch)
        yield request.param


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Every test starts from one seed, and TF32 stays off: the tolerances are those of fp32."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _poisoned_memory() -> object:
    """Fresh memory holds NaN, so that a kernel that leaves an element unwritten is caught."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(autouse=True)
def _kernels_for_every_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerated models run the kernels also where they are slower, as with the small inputs of tests."""
    if request.node.get_closest_marker("measured_wins") is None:
        monkeypatch.setattr(nf.patching.wins, "wins", lambda *_: True)
        monkeypatch.setattr(nf.patching.wins, "often", lambda *_: True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> nf.data.ImageDataset:
    return nf.data.open_dataset("digits", split="train")
