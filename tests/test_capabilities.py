"""The C++ kernels of every instruction set, where a machine would only run its own best: the accuracy tests of all ops
again, in a process that is told to use another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from internals import EXTENSION

ROOT = Path(__file__).resolve().parents[1]
_INFO = {"cpu_capability": "", "cpu_capabilities": [], **EXTENSION}
OTHERS = [c for c in _INFO["cpu_capabilities"] if c != _INFO["cpu_capability"]]
_REPORT = """
import sys, pytest
from nvae_fast.ops import _extension
status = pytest.main(sys.argv[1:])
print("capability:", _extension.info()["cpu_capability"])
sys.exit(status)
"""


@pytest.mark.skipif(
    not OTHERS, reason="needs the C++ extension and a machine with more than one instruction set"
)
@pytest.mark.parametrize("capability", OTHERS)
def test_accuracy_of_the_other_instruction_sets(capability: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _REPORT, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "tests"]
        + ["-k", "accura and not triton and not instruction_sets"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NVAE_FAST_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"capability: {capability}" in done.stdout, done.stdout[-1000:]
