"""How long a benchmark run takes and how much it measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Settings:
    """How long and how much, in seconds.

    seconds: measuring time of one shape of one op; model_seconds: of one setting in one case.
    compile_seconds: compilation time of all ops together, shared evenly by the cases; model_compile_seconds:
        of all whole models.
    budget: of the whole run; a shape or setting that would start later is skipped and named. None: no limit.
    models_until: settings that would start later than this after the first are skipped. scale: which shapes.
    full_models: on a CPU measure the settings in ``model.FULL`` at that size, not scaled down.
    """

    device: torch.device
    scale: str
    seconds: float
    model_seconds: float
    compile_seconds: float
    model_compile_seconds: float
    models_until: float
    all_shapes_compiled: bool = False
    full_models: bool = False
    min_rounds: int = 5
    budget: float | None = None

    @property
    def quick(self) -> bool:
        return self.scale in ("quick", "tiny")


def settings_for(device: torch.device, *, quick: bool = False, tiny: bool = False) -> Settings:
    """The defaults: a few minutes on two cores or on a GPU; quick: under a minute."""
    if tiny:
        return Settings(device, "tiny", 0.0, 0.0, 0.0, 0.0, 0.0, min_rounds=1)
    if quick:
        return Settings(device, "quick", 0.2, 0.5, 0.0, 0.0, 0.0, min_rounds=3)
    if device.type == "cuda":
        return Settings(device, "cuda", 0.4, 2.0, 80.0, 90.0, 90.0)
    # The 14 graphs of a small model's cells took over five minutes to compile here: only when asked for.
    return Settings(device, "cpu", 0.8, 2.0, 120.0, 0.0, 120.0)


class CompileBudget:
    """Compilation time is bounded over the run. Each of ``cases`` gets an equal share; what one leaves over,
    the next may use."""

    def __init__(self, seconds: float, cases: int, *, quick: bool, option: str) -> None:
        self._seconds, self._cases, self._quick, self._option = seconds, max(cases, 1), quick, option
        self._started = 0
        self.spent = 0.0

    def next_case(self) -> None:
        """A case begins: its share is added to what may be spent."""
        self._started += 1

    @property
    def left(self) -> float:
        """Seconds the next compilation may take."""
        return self._seconds * self._started / self._cases - self.spent

    def reason(self, *, first: bool) -> str:
        """Why the next workload is not compiled; empty when it is. first: of its case."""
        if self._seconds <= 0:
            return "left out of a quick run" if self._quick else f"left out: {self._option} is 0"
        if not first:
            return "only the first shape is compiled (--compile-all-shapes)"
        if self.left <= 1:
            return f"the time for compilation, {self._seconds:.0f} s, is spent ({self._option})"
        return ""
