"""Memory that tensors free."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from nvae_fast.training import memory

VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What mallopt was called with."""
    found: dict[int, int] = {}
    library = SimpleNamespace(mallopt=found.__setitem__)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    for name in (*VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.skipif(os.name != "posix", reason="asks the C library")
def test_freed_memory_is_kept(options: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    memory.keep_freed_memory()
    assert options == {memory.M_TRIM_THRESHOLD: -1, memory.M_MMAP_THRESHOLD: 2**30}


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, "1") for name in VARIABLES), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")],
)
def test_settings_of_the_user_stay(
    name: str, value: str, options: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    memory.keep_freed_memory()
    assert not options


def test_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace())
    memory.keep_freed_memory()
