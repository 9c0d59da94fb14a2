"""The stand-in GPU refuses and reports what a GPU would: else the other tests on it could not fail."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from running import needs_stand_in, results

pytestmark = needs_stand_in


@lru_cache(maxsize=1)
def found() -> dict[str, Any]:
    (result,) = results("refusals.py")
    return result


@pytest.mark.parametrize("what", ["launch", "launch in a capture", "graph"])
def test_accepts(what: str) -> None:
    assert found()[what] == ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("module load in a capture", "operation not permitted when stream is capturing"),
        ("grid", "a grid of 1, 65536"),
        ("pointer to the host", "cannot be accessed from Triton"),
        ("pointer past the end", "cannot be accessed from Triton"),
        ("pointer to freed memory", "cannot be accessed from Triton"),
        ("misaligned pointer", "misaligned address"),
        ("too much shared memory", "out of resource: shared memory, Required: "),
        ("graph of freed memory", "a graph reads memory that is free again"),
        ("pool", "writes into the pool of a graph"),
    ],
)
def test_refuses(what: str, message: str) -> None:
    assert message in found()[what]


def test_codes_of_launches() -> None:
    assert found()["codes"] == {
        "launch": 0,
        "too many threads": 1,
        "threads it was not compiled for": 1,
        "more shared memory than asked for": 1,
        "no function": 400,
    }


def test_waits_and_copies_are_seen_with_their_lines() -> None:
    waits = found()["waits"]
    for operator, line in (
        ("aten._local_scalar_dense.default waits", "x[0].item()"),
        ("aten._to_copy.default copies from the host", 'torch.tensor([1.0, 2.0]).to("cuda")'),
        ("copies", "x[[1, 2]] = 0.0"),
        ("with a mask waits", "x[x > 0]"),
        ("aten.nonzero.default waits", "x.nonzero()"),
    ):
        assert any(operator in wait and line in wait for wait in waits), (operator, line, waits)
    assert not any("torch.full" in wait or "x[1:3]" in wait for wait in waits)


def test_counts() -> None:
    report = found()["report"]
    assert report["loads_in_capture"] == 1
    copies = [kernel for kernel in report["kernels"] if "copy_kernel" in kernel["name"]]
    assert all(kernel["registers"] > 0 for kernel in copies)
    assert sum(kernel["launches_in_capture"] for kernel in copies) == 1
