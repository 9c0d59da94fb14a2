"""Processes on the stand-in GPU, for the tests: whether they can be had, and what they print."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Kept between runs: a kernel is compiled in about half a second, and there are hundreds.
FOLDER = Path(os.environ.get("NVAE_FAST_STANDIN", ROOT / "build" / "gpu_standin"))


def missing() -> str:
    """What a stand-in GPU would need and is not here."""
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is no CUDA build"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 6):
        return f"triton {version('triton')} is older than 3.6"
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        return f"triton {version('triton')} has no NVIDIA backend"
    return ""


needs_stand_in = pytest.mark.skipif(bool(missing()), reason=f"no stand-in GPU: {missing()}")


def results(script: str, *arguments: str, fused: bool = False, timeout: int = 1800) -> list[dict[str, Any]]:
    """What ``script`` prints, started in a process of its own; ``fused``: with the operators of the CUDA sources."""
    environment = {
        **os.environ,
        "NVAE_FAST_STANDIN": str(FOLDER / f"torch-{torch.__version__}"),
        "NVAE_FAST_STANDIN_FUSED": "1" if fused else "",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "NVAE_FAST_BACKEND"):
        environment.pop(name, None)
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [{**json.loads(line), "stderr": done.stderr} for line in lines]
