"""``python -m benchmarks.parts``: how much faster each part that nvae_fast.accelerate replaces is than its own forward.

The parts are those of tests/foreign_model.py and of PyTorch, each in the fastest form that models have it in. The result is
the table of this machine, in nvae_fast/patching/measured, by which accelerate chooses. Run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from nvae_fast.io import atomic_file
from nvae_fast.patching import wins
from nvae_fast.patching.apply import replace
from nvae_fast.patching.bound import bound_forward
from nvae_fast.patching.measure import speedups
from nvae_fast.training.memory import keep_freed_memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import foreign_model as foreign

Make = Callable[[int], nn.Module]
# (B, C, side): from the last cells of NVAE and of EfficientNets to the first.
SIZES = (
    (8, 16, 16), (4, 480, 6), (4, 144, 12), (4, 96, 24), (1, 64, 56), (8, 32, 32), (8, 64, 16), (32, 64, 8), (8, 128, 16),
    (32, 128, 8), (2, 32, 112), (8, 96, 56), (8, 240, 14),
    (32, 512, 8), (8, 1152, 7),
)  # fmt: skip
LARGE = 300_000  # elements above which cells and convolutions that mix channels are not measured: they take seconds


def _depthwise(kernel: int, stride: int) -> Make:
    return lambda c: nn.Conv2d(c, c, kernel, stride, kernel // 2, groups=c, bias=False)


class _Gate(nn.Module):
    def __init__(self, channels: int, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = (
            nn.Conv2d(channels, max(channels // 16, 4), 1),
            nn.Conv2d(max(channels // 16, 4), channels, 1),
        )
        self.activation, self.gate = activation, gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.expand(self.activation(self.reduce(x.mean((2, 3), keepdim=True)))))


class SqueezeExcitation(_Gate):
    """By a name that accelerate knows."""


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class _MBConv(nn.Module):
    """A block of MobileNetV2, or with ``gate`` of EfficientNet."""

    def __init__(self, channels: int, kernel: int, gate: bool) -> None:
        super().__init__()
        wide, act = 6 * channels, nn.SiLU if gate else nn.ReLU6
        depthwise = nn.Conv2d(wide, wide, kernel, 1, kernel // 2, groups=wide, bias=False)
        self.block = nn.Sequential(
            *(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), act(inplace=True)),
            *(depthwise, nn.BatchNorm2d(wide), act(inplace=True)),
            *((SqueezeExcitation(wide, nn.SiLU(inplace=True), nn.Sigmoid()),) if gate else ()),
            *(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.block(x)
        y += x
        return y


def _cell(stride: int, gate: bool) -> Make:
    def make(c: int) -> nn.Module:
        out = {1: c, 2: 2 * c, -1: c // 2}[stride]
        skip = (
            nn.Identity()
            if stride == 1
            else (foreign.FactorizedReduce if stride == 2 else foreign.UpSkip)(c, out)
        )
        return foreign.Cell([foreign.InvertedResidual(c, out, stride)], skip, out, use_se=gate)

    return make


PARTS_MEASURED: tuple[Make, ...] = (
    foreign.SyncBatchNormSwish,
    lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.SiLU(inplace=True)),
    BatchNormAct2d,
    foreign.SE,
    lambda c: SqueezeExcitation(c, nn.SiLU(inplace=True), nn.Sigmoid()),
    lambda c: SqueezeExcitation(c, nn.ReLU(inplace=True), nn.Hardsigmoid()),
    lambda c: SqueezeExcitation(c, nn.SiLU(inplace=True), nn.Hardsigmoid()),
    lambda c: foreign.Cell([nn.BatchNorm2d(c)], nn.Identity(), c, use_se=True),
    lambda c: foreign.Cell([nn.BatchNorm2d(c)], nn.Identity(), c, use_se=False),
    _depthwise(3, 1), _depthwise(3, 2), _depthwise(5, 1), _depthwise(5, 2), _depthwise(7, 1),
    lambda c: foreign.MaskedConv2d(c, c, 3, groups=c),
    lambda c: foreign.MaskedConv2d(c, c, 5, groups=c),
    lambda c: foreign.Conv2D(c, c, 1, bias=True),
    lambda c: foreign.Conv2D(c, c, 3, padding=1, bias=True),
    _cell(1, True), _cell(2, True), _cell(-1, True),
    lambda c: _MBConv(c, 3, False), lambda c: _MBConv(c, 5, True),
)  # fmt: skip


def rows(
    device: torch.device, dtypes: list[str], seconds: float, sizes: Any = SIZES, only: str = ""
) -> list[list[Any]]:
    """The table, a list for each row: device, dtype, part, mode, layout, batch, channels, pixels, ratio, and the
    microseconds of the part's own forward."""
    found: list[list[Any]] = []
    for make in PARTS_MEASURED:
        for b, c, side in sizes:
            torch.manual_seed(0)
            own = make(c)
            slow = isinstance(own, (foreign.Cell, foreign.Conv2D, _MBConv)) and not isinstance(
                own, foreign.MaskedConv2d
            )
            if slow and b * c * side**2 > LARGE:
                continue
            part = replace(own.to(device), everywhere=True)
            bound = bound_forward(part)
            if bound is None or bound.part is None:
                raise RuntimeError(f"accelerate leaves {type(part).__name__}")
            name = bound.part[0]
            if only not in name:
                continue
            for layout in ("contiguous", "channels_last"):
                form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
                part.to(memory_format=form)
                x = torch.randn(b, c, side, side, device=device).to(memory_format=form)
                for dtype in dtypes:
                    half = None if dtype == "float32" else getattr(torch, dtype)
                    with torch.autocast(device.type, half, enabled=half is not None):
                        measured = speedups(part, x if half is None else x.to(half), seconds)
                    if isinstance(own, _MBConv):  # in training its parts are what runs
                        del measured["training"]
                    for mode, (ratio, microseconds) in measured.items():
                        row = [
                            device.type,
                            dtype,
                            name,
                            mode,
                            layout,
                            b,
                            c,
                            side * side,
                            round(ratio, 3),
                            round(microseconds, 1),
                        ]
                        found.append(row)
                        print(*row, sep="  ", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument(
        "--seconds", type=float, default=0.15, help="for each part, size, layout and mode; default: 0.15"
    )
    parser.add_argument("--out", type=Path, help="default: the table of this machine, which accelerate reads")
    parser.add_argument(
        "--parts", default="", help="only those with this text in their names; the others' rows stay"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    keep_freed_memory()
    described = machine.describe(device)
    out = options.out or wins.FOLDER / f"{described['machine']['name']}.json"
    found = rows(device, options.dtypes, options.seconds, only=options.parts)
    kept = []
    if out.exists():  # of other devices, dtypes and parts
        done = {(device.type, dtype) for dtype in options.dtypes}
        kept = [
            row
            for row in json.loads(out.read_text())["rows"]
            if tuple(row[:2]) not in done or options.parts not in row[2]
        ]
    lines = ",\n  ".join(json.dumps(row) for row in [*kept, *found])
    facts = {key: described[key] for key in ("machine", "versions", "date")}
    head = json.dumps({**facts, "threads": torch.get_num_threads()})
    with atomic_file(out) as file:
        file.write(f'{{"measured_on": {head},\n "rows": [\n  {lines}\n ]}}\n'.encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
