"""The versions that the package says it supports are those that `make matrix` was run with."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import matrix
import pytest

if not matrix.JSON.exists():
    pytest.skip("make matrix has written no docs/support.json yet", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = json.loads(matrix.JSON.read_text(encoding="utf-8"))
RUNS = [matrix.Cell.parse(name) for name in DOCUMENT["cells"]]


def test_every_python_and_pytorch_was_run() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert len(pythons) == 4
    assert {cell.python for cell in RUNS} >= set(pythons)
    oldest, newest = re.search(
        r"PyTorch (\d\.\d+)\s+to (\d\.\d+)", (ROOT / "README.md").read_text(encoding="utf-8")
    ).groups()
    (required,) = set(re.findall(r'"torch>=([\d.]+)"', project))
    assert oldest == required
    minors = range(*(int(version.split(".")[1]) + i for i, version in enumerate((oldest, newest))))
    assert {cell.torch for cell in RUNS} >= {f"2.{minor}" for minor in minors}
    assert set(map(matrix.Cell.parse, matrix.CELLS.split())) <= set(RUNS)


@pytest.mark.parametrize("cell", RUNS, ids=str)
def test_every_run_passed(cell: matrix.Cell) -> None:
    found = DOCUMENT["cells"][f"{cell.python}x{cell.torch}"]
    assert found["passed"]
    assert found["tests"]["passed"] > 500
    assert not {"failed", "error", "errors"} & set(found["tests"])
    assert found["wheel"].endswith("-cp310-abi3-linux_x86_64.whl")
    assert found["versions"]["python"].startswith(f"{cell.python}.")
    assert found["versions"]["torch"].startswith(f"{cell.torch}.")


def test_every_pytorch_compiled_the_sources() -> None:
    built = {cell.torch for cell in RUNS if DOCUMENT["cells"][f"{cell.python}x{cell.torch}"]["built"]}
    assert built == {cell.torch for cell in RUNS}


def test_the_page_shows_the_runs() -> None:
    assert matrix.table(DOCUMENT) in matrix.PAGE.read_text(encoding="utf-8")
    assert DOCUMENT["date"] in matrix.PAGE.read_text(encoding="utf-8")


def test_the_essential_tests_are_there() -> None:
    assert not [
        name for name in (*matrix.TESTS, *matrix.INTERPRETED) if not (ROOT / "tests" / f"{name}.py").is_file()
    ]


def test_cells_are_validated() -> None:
    assert matrix.Cell.parse("3.12x2.11") == matrix.Cell("3.12", "2.11")
    for text in ("3.12", "3.12x2", "2.11-3.12", "3.12x2.11x"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected Python and PyTorch"):
            matrix.Cell.parse(text)


def test_kernels_include_nothing_of_pytorch() -> None:
    """Their objects are the same for every PyTorch."""
    kernels = sorted((ROOT / "csrc").glob("cpu/*.vec.cpp"))
    assert kernels
    for kernel in kernels:
        seen, waiting = set(), [kernel]
        while waiting:
            page = waiting.pop()
            text = page.read_text(encoding="utf-8")
            assert "torch/" not in text, f"{kernel.name} includes {page.name}"
            names = re.findall(r'#include "([^"]+)"', text)
            found = {place / name for name in names for place in (page.parent, ROOT / "csrc")}
            waiting += [path for path in found if path.is_file() and path not in seen]
            seen |= found
