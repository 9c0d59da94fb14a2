"""How much faster the kernel of a part is than its own forward, measured here and now."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from nvae_fast.patching.bound import bound_forward, remove
from nvae_fast.patching.clone import clone
from nvae_fast.patching.verify import communicates, restored
from nvae_fast.patching.wins import Speedup

MODES = ("evaluation", "training")
ROUNDS = 7


def speedups(part: nn.Module, x: torch.Tensor, seconds: float) -> dict[str, Speedup]:
    """Return for each mode how much faster than its own forward an accelerated ``part`` computes ``x`` with its kernel.

    Both run on copies, in turns, for ``seconds`` a mode and at least :data:`ROUNDS` times, under the autocast and the flags in
    force. Lower quartiles are compared; with one thread on the CPU, of processor time, which other processes do not change.
    A part that communicates in training mode is measured in evaluation mode only: processes make different numbers of rounds.
    """
    own, ours = clone(part, None), clone(part, None)
    for inner in own.modules():
        remove(inner)
    bound = bound_forward(ours)
    if bound is None:
        raise ValueError(f"{type(part).__name__} is not accelerated")
    bound.always = True
    found: dict[str, Speedup] = {}
    with restored(x.device):
        for mode in MODES[:1] if communicates(part) else MODES:
            training = mode == "training"
            runs = [_run(module.train(training), x, training) for module in (own, ours)]
            mine, kernel = _quartiles(runs, seconds, x.device)
            found[mode] = Speedup(mine / kernel, 1e6 * mine)
    return found


def _run(module: nn.Module, x: torch.Tensor, training: bool) -> Callable[[], None]:
    leaf = x.detach().clone().requires_grad_(training)
    parameters = [p for p in module.parameters() if p.requires_grad]
    upstream: Any = None

    def run() -> None:
        nonlocal upstream
        with torch.set_grad_enabled(training):
            y = module(leaf * 1 if training else leaf)
        if training:
            upstream = torch.ones_like(y) if upstream is None else upstream
            torch.autograd.grad(y, [leaf, *parameters], upstream, allow_unused=True)

    return run


def _quartiles(runs: list[Callable[[], None]], seconds: float, device: torch.device) -> list[float]:
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    clock = clock_for(device)
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:  # warm-up
        run()
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = clock() + seconds
        while len(times[0]) < ROUNDS or clock() < end:
            for run, taken in zip(runs, times, strict=True):
                wait()
                start = clock()
                run()
                wait()
                taken.append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    return [statistics.quantiles(taken, n=4, method="inclusive")[0] for taken in times]


def clock_for(device: torch.device) -> Callable[[], float]:
    """Processor time of this process where one thread of the CPU does everything, else time."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter
