"""Tables of a CUDA graph, without a GPU: who records, what a graph owns, and that nothing is launched to fill it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast.ops import _capture, depthwise_conv2d

CUDA = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A current stream, and whether it is capturing."""
    state = SimpleNamespace(capturing=False, stream=SimpleNamespace(device=CUDA, cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return state


def outside() -> SimpleNamespace:
    """A stream whose memory is the host's."""
    return SimpleNamespace(device=torch.device("cpu"), cuda_stream=0)


def test_rehearsals_and_captures_are_known_by_their_stream(cuda):
    other = SimpleNamespace(device=CUDA, cuda_stream=8)
    assert not _capture.recorded(CUDA)
    assert not _capture.recorded(torch.device("cpu"))
    with _capture.recording(cuda.stream):
        assert _capture.recorded(CUDA)
        assert _capture.constants(CUDA) is None
        cuda.stream, mine = other, cuda.stream
        assert not _capture.recorded(CUDA), "what others run is not recorded"
        cuda.stream = mine
    assert not _capture.recorded(CUDA)
    constants = _capture.Constants(outside())
    cuda.capturing = True
    assert _capture.recorded(CUDA), "whoever captures"
    assert _capture.constants(CUDA) is None
    with _capture.recording(cuda.stream, constants):
        assert _capture.constants(CUDA) is constants
        cuda.stream = other
        assert _capture.constants(CUDA) is None, "constants belong to one graph"


def test_constants_are_filled_after_the_capture():
    constants = _capture.Constants(outside())
    numbers = (3, 2**50, -1), (7,)
    tables = [constants.table(n) for n in numbers]
    assert len({t.data_ptr() for t in tables}) == 2
    constants.fill()
    assert [tuple(t.tolist()) for t in tables] == list(numbers)


def test_a_graph_gets_its_tables_without_a_launch(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from nvae_fast.kernels import weight_norm

    cpu, shapes = torch.device("cpu"), ((5, 3), (9, 7))
    known = weight_norm._plan_tables(shapes, cpu)
    constants = _capture.Constants(outside())
    monkeypatch.setattr(_capture, "capturing", lambda device: True)
    monkeypatch.setattr(_capture, "constants", lambda device: constants)
    monkeypatch.setattr(
        weight_norm, "written", lambda numbers, device: pytest.fail("a launch in every replay")
    )
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    assert weight_norm._plan_tables(shapes, cpu) is known, "what the warm-up made lives on"
    addresses = weight_norm._address_table((1, 2**50), cpu)
    fresh = weight_norm._plan_tables(((11, 2),), cpu)
    constants.fill()
    assert addresses.tolist() == [1, 2**50]
    assert tuple(tuple(t.tolist()) for t in fresh) == weight_norm._plan(((11, 2),))[:2]


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a tensor of the host takes part, as it would be copied to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
            assert not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta", (
                f"{func} with {leaf.device}"
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("taps", [[12], [0, 1, 2, 12], [24, 3, 7, 8], list(range(25))])
def test_taps_are_no_list_that_is_copied(taps):
    weight = torch.randn(3, 1, 5, 5)
    device = weight.to("meta")
    with NothingFromTheHost():
        depthwise_conv2d._masked(device, taps)
    expected = torch.zeros(3, 25)
    expected[:, taps] = weight.flatten(1)[:, taps]
    assert torch.equal(depthwise_conv2d._masked(weight, taps).flatten(1), expected)
