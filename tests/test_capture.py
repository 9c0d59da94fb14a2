"""Tables of a CUDA graph, without a GPU: who records, what a graph owns, and that nothing is launched to fill it."""

from __future__ import annotations

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
    return state


def test_rehearsals_and_captures_are_known_by_their_stream(cuda):
    other, mine = SimpleNamespace(device=CUDA, cuda_stream=8), cuda.stream
    assert not _capture.recorded(CUDA)
    assert not _capture.recorded(torch.device("cpu"))
    rehearsal = _capture.Recording()
    with _capture.recording(mine, rehearsal):
        assert _capture.recorded(CUDA)
        assert _capture.table((1, 2), CUDA) is None
        cuda.stream = other
        assert not _capture.recorded(CUDA), "what others run is not recorded"
        assert _capture.table((1, 2), CUDA) is None
        cuda.stream = mine
    assert rehearsal.needed == _capture.ALIGNED
    assert not _capture.recorded(CUDA)
    cuda.capturing = True
    assert _capture.recorded(CUDA), "whoever captures"
    assert _capture.table((1, 2), CUDA) is None
    with _capture.recording(mine, _capture.Recording(torch.empty(rehearsal.needed, dtype=torch.int64))):
        assert _capture.table((1, 2), CUDA) is not None
        assert _capture.table((3,), CUDA) is None, "more than the rehearsal needed"


def test_tables_are_filled_after_the_capture():
    numbers = [(3, 2**50, -1), (7,), tuple(range(100))]
    rehearsal = _capture.Recording()
    assert [rehearsal.table(n) for n in numbers] == [None] * 3
    memory = torch.empty(rehearsal.needed, dtype=torch.int64)
    recording = _capture.Recording(memory)
    tables = [recording.table(n) for n in numbers]
    assert {(t.data_ptr() - memory.data_ptr()) % 512 for t in tables} == {0}, "as aligned as in the rehearsal"
    recording.fill()
    assert [tuple(t.tolist()) for t in tables] == numbers


def test_a_graph_gets_its_tables_without_a_launch(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from nvae_fast.kernels import weight_norm

    cpu, shapes = torch.device("cpu"), ((5, 3), (9, 7))
    known = weight_norm._plan_tables(shapes, cpu)
    recording = _capture.Recording(torch.empty(64, dtype=torch.int64))
    monkeypatch.setattr(_capture, "capturing", lambda device: True)
    monkeypatch.setattr(_capture, "table", lambda numbers, device: recording.table(numbers))
    monkeypatch.setattr(
        weight_norm, "written", lambda numbers, device: pytest.fail("a launch in every replay")
    )
    assert weight_norm._plan_tables(shapes, cpu) is known, "what the warm-up made lives on"
    addresses = weight_norm._address_table((1, 2**50), cpu)
    recording.fill()
    assert addresses.tolist() == [1, 2**50]


class NoIndices(TorchDispatchMode):
    """Fails on indexing with tensors, which are copied to the device where they are made from a list."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "index" not in str(func), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("taps", [[12], [0, 1, 2, 12], [24, 3, 7, 8], list(range(25))])
def test_taps_are_no_list_that_is_copied(taps):
    weight = torch.randn(3, 1, 5, 5)
    with NoIndices():
        masked = depthwise_conv2d._masked(weight, taps)
    expected = torch.zeros(3, 25)
    expected[:, taps] = weight.flatten(1)[:, taps]
    assert torch.equal(masked.flatten(1), expected)
