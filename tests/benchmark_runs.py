"""Benchmark cases on tiny shapes."""

from __future__ import annotations

import torch

from benchmarks import run
from benchmarks.case import load_cases

CPU = torch.device("cpu")
CASES = load_cases()
TINY = run.settings_for(CPU, tiny=True)


def tiny_run(names: list[str]) -> dict:
    return run.run(names, TINY, say=lambda line: None)
