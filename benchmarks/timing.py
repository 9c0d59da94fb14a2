"""Clocks and interleaving: every provider takes its turn in every round, so that drift hits all of them
alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from nvae_fast.training.memory import keep_freed_memory

FLUSH_BYTES = 256 * 2**20  # more than any GPU's second-level cache


class Clock(Protocol):
    """``start()``, then ``lap(name)`` at the end of each pass; ``collect()`` gives {name: seconds} of the
    sample."""

    def start(self) -> None: ...
    def lap(self, name: str) -> None: ...
    def collect(self) -> dict[str, float]: ...


class CpuClock:
    """Monotonic host time."""

    def __init__(self) -> None:
        self._laps: list[tuple[str, int]] = []

    def start(self) -> None:
        self._laps = [("", time.perf_counter_ns())]

    def lap(self, name: str) -> None:
        self._laps.append((name, time.perf_counter_ns()))

    def collect(self) -> dict[str, float]:
        pairs = zip(self._laps, self._laps[1:], strict=False)
        return {name: (now - before) * 1e-9 for (_, before), (name, now) in pairs}


class ProcessClock(CpuClock):
    """Processor time of this process, which others on the machine do not change: for one thread."""

    def start(self) -> None:
        self._laps = [("", time.process_time_ns())]

    def lap(self, name: str) -> None:
        self._laps.append((name, time.process_time_ns()))


class CudaClock:
    """CUDA events on the current stream. Before every sample the second-level cache is overwritten, which
    also keeps the device busy while the host queues the work, so that launch latency shows only where it
    exceeds the work."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._laps: list[tuple[str, torch.cuda.Event]] = []

    def start(self) -> None:
        self._laps = []
        self._flush.zero_()
        self.lap("")

    def lap(self, name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._laps.append((name, event))

    def collect(self) -> dict[str, float]:
        torch.cuda.synchronize()
        pairs = zip(self._laps, self._laps[1:], strict=False)
        return {name: before.elapsed_time(now) * 1e-3 for (_, before), (name, now) in pairs}


class WallClock(CpuClock):
    """Host time with the device drained at both ends: for whole steps, where the host's own work counts."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._drain: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def start(self) -> None:
        self._drain()
        super().start()

    def lap(self, name: str) -> None:
        self._drain()
        super().lap(name)


def clock_for(device: torch.device) -> Clock:
    """The clock for single ops on ``device``."""
    return CudaClock() if device.type == "cuda" else CpuClock()


@dataclass
class Series:
    """Seconds of one pass of one provider, a number for each round."""

    seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | int]:
        """Median, quartiles and minimum in milliseconds, and how many samples."""
        ms = sorted(1e3 * s for s in self.seconds)
        lower, upper = ms[0], ms[-1]
        if len(ms) >= 3:
            lower, _, upper = statistics.quantiles(ms, n=4, method="inclusive")
        return {
            "median_ms": statistics.median(ms),
            "lower_quartile_ms": lower,
            "upper_quartile_ms": upper,
            "min_ms": ms[0],
            "samples": len(ms),
        }


def median_ratio(a: Series, b: Series) -> tuple[float, float, float]:
    """The median over rounds of the ratio a / b, and its 95 % interval: the order statistics that the sign test gives.

    A slow phase of the machine takes both of a round, and so leaves their ratio.
    """
    ratios = sorted(x / y for x, y in zip(a.seconds, b.seconds, strict=True))
    n = len(ratios)
    rank = max(int((n - 1.96 * math.sqrt(n)) / 2), 0)
    return statistics.median(ratios), ratios[rank], ratios[n - 1 - rank]


def interleave(
    samples: Mapping[str, Callable[[Clock], None]],
    clock: Clock,
    *,
    seconds: float,
    warmup: int = 2,
    min_rounds: int = 3,
    max_rounds: int = 200,
) -> tuple[dict[str, dict[str, Series]], dict[str, str]]:
    """Round robin A B C A B C ... until ``seconds`` are spent.

    Args:
        samples: provider -> function that takes one sample on the clock it is given.
        seconds: time to spend on measuring; at least ``min_rounds`` rounds are made whatever they take.
        warmup: rounds that are not counted.

    Returns:
        {provider: {pass: Series}} and {provider: error} of those that raised, which are left out of further
        rounds.
    """
    keep_freed_memory()
    times: dict[str, dict[str, Series]] = {name: {} for name in samples}
    failures: dict[str, str] = {}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for round_number in range(-warmup, max_rounds):
            if round_number == 0:
                started = time.perf_counter()
            if round_number >= min_rounds and time.perf_counter() - started > seconds:
                break
            for name, sample in samples.items():
                if name in failures:
                    continue
                try:
                    sample(clock)
                    laps = clock.collect()
                except Exception as error:
                    failures[name] = f"{type(error).__name__}: {error}"
                    times.pop(name)
                    continue
                if round_number >= 0:
                    for lap, value in laps.items():
                        times[name].setdefault(lap, Series()).seconds.append(value)
    finally:
        if collecting:
            gc.enable()
    return times, failures


def take_turns(
    runs: Mapping[str, Callable[[], None]], rounds: int, before: Callable[[str], None] | None = None
) -> dict[str, Series]:
    """The times of each of ``runs``, which take turns: with one thread of processor time, else of the wall clock.

    ``before`` is called with the name of each run before it; it is not timed.
    """

    def timed(name: str, run: Callable[[], None]) -> Callable[[Clock], None]:
        def sample(clock: Clock) -> None:
            if before is not None:
                before(name)
            clock.start()
            run()
            clock.lap("run")

        return sample

    clock = ProcessClock() if torch.get_num_threads() == 1 else CpuClock()
    samples = {who: timed(who, run) for who, run in runs.items()}
    times, failed = interleave(samples, clock, seconds=0, min_rounds=rounds, warmup=1)
    if failed:
        raise RuntimeError(str(failed))
    return {who: series["run"] for who, series in times.items()}
