"""``python -m benchmarks.family``: a whole model in the style of NVAE code found elsewhere, before and after accelerate.

The model is made of the parts of tests/foreign_model.py, in the shape of a preset: training step (loss, spectral and batch
norm regularisation, Adamax), sampling, evaluation, and sampling and evaluation when frozen. Every provider takes its turn in
every round; ratios are of medians, with one thread (OMP_NUM_THREADS=1) of processor time. The likelihood is a Bernoulli or a
normal distribution, in PyTorch's own functions.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import nvae_fast as nf
from benchmarks.timing import median_ratio, take_turns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import foreign_model as foreign

Z = 20
SETTINGS = {
    "mnist": {"images": (1, 32), "channels": 32, "groups": (5, 10), "pre": (2, 3), "flows": 0, "batch": 16},
    "cifar10": {"images": (3, 32), "channels": 64, "groups": (10,), "pre": (1, 2), "flows": 1, "batch": 8},
    "tiny": {"images": (1, 16), "channels": 8, "groups": (1, 1), "pre": (1, 1), "flows": 1, "batch": 2},
}


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.spatial = (
            foreign.MaskedConv2d(Z, 6 * Z, 3),
            foreign.MaskedConv2d(6 * Z, 6 * Z, 5, groups=6 * Z),
        )
        self.last = foreign.MaskedConv2d(6 * Z, Z, 1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z - self.last(F.elu(F.elu(self.spatial(F.elu(self.first(z))))))


def _cell(kind: str, c: int, stride: int, expansion: int = 6) -> nn.Module:
    out = {1: c, 2: 2 * c, -1: c // 2}[stride]
    skip = {1: lambda *_: nn.Identity(), 2: foreign.FactorizedReduce, -1: foreign.UpSkip}[stride](c, out)
    if kind == "residual":
        ops: list[nn.Module] = [foreign.BNSwishConv(c, out, stride), foreign.BNSwishConv(out, out, 1)]
    else:
        ops = [foreign.InvertedResidual(c, out, stride, expansion)]
    return foreign.Cell(ops, skip, out, use_se=True)


def _conv(c_in: int, c_out: int, kernel: int) -> nn.Module:
    return foreign.Conv2D(c_in, c_out, kernel, padding=kernel // 2, bias=True)


def _normal(parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, log_sigma = (5 * torch.tanh(p / 5) for p in parameters.chunk(2, 1))
    return mean, log_sigma.exp() + 1e-2


def _log_prob(z: torch.Tensor, mean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return -0.5 * ((z - mean) / sigma).square() - 0.5 * 1.8378770664093453 - sigma.log()


class FamilyVAE(nn.Module):
    """Bottom-up tower, top-down tower with residual-normal groups and flows, image head."""

    def __init__(
        self,
        images: tuple[int, int],
        channels: int,
        groups: tuple[int, ...],
        pre: tuple[int, int],
        flows: int,
        **_: Any,
    ):
        super().__init__()
        self.images, self.groups, self.flow_count = images, groups, flows
        blocks, cells = pre
        width, side = channels, images[1]
        self.stem = _conv(images[0], channels, 3)
        self.pre, self.post = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            self.pre.extend(
                [_cell("residual", width, 1) for _ in range(cells - 1)] + [_cell("residual", width, 2)]
            )
            width, side = 2 * width, side // 2
        self.enc, self.enc_combine = nn.ModuleList(), nn.ModuleList()
        for scale, count in enumerate(reversed(groups)):
            for group in range(count):
                self.enc.append(nn.ModuleList([_cell("residual", width, 1) for _ in range(2)]))
                if (scale, group) != (len(groups) - 1, count - 1):
                    self.enc_combine.append(_conv(width, width, 1))
            if scale < len(groups) - 1:
                self.enc.append(nn.ModuleList([_cell("residual", width, 2)]))
                width, side = 2 * width, side // 2
        self.head = _conv(width, width, 1)
        self.top = nn.Parameter(torch.rand(width, side, side))
        self.posterior, self.prior, self.flows = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.dec, self.dec_combine, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for scale, count in enumerate(groups):
            for group in range(count):
                first = scale == group == 0
                self.posterior.append(_conv(width, 2 * Z, 3))
                self.prior.append(nn.Identity() if first else _conv(width, 2 * Z, 1))
                self.flows.append(nn.Sequential(*[Flow() for _ in range(2 * flows)]))
                self.dec.append(
                    nn.Sequential(*[_cell("inverted", width, 1) for _ in range(0 if first else 2)])
                )
                self.dec_combine.append(_conv(width + Z, width, 1))
            if scale < len(groups) - 1:
                self.up.append(_cell("inverted", width, -1))
                width //= 2
        for _ in range(blocks):
            self.post.append(_cell("inverted", width, -1, 3))
            width //= 2
            self.post.extend([_cell("inverted", width, 1, 3) for _ in range(cells - 1)])
        self.image = _conv(width, images[0] if images[0] == 1 else 2 * images[0], 3)
        self.convolutions = [m for m in self.modules() if isinstance(m, foreign.Conv2D)]
        self.vectors: dict[Any, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s, kept = self.stem(2 * x - 1), []
        for cell in self.pre:
            s = cell(s)
        for block in self.enc:
            for cell in block:
                s = cell(s)
            if len(block) == 2:
                kept.append(s)
        top = F.elu(self.head(F.elu(kept.pop())))
        return self._down(x.shape[0], kept, top)

    def sample(self, n: int) -> torch.Tensor:
        return self._down(n, None, None)[0]

    def _down(self, n: int, kept: Any, top: Any) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.top.unsqueeze(0).expand(n, -1, -1, -1)
        kl: Any = 0.0
        index = 0
        for scale, count in enumerate(self.groups):
            for _ in range(count):
                s = self.dec[index](s)
                prior = self.prior[index](F.elu(s)) if index else torch.zeros(n, 2 * Z, *s.shape[2:])
                mean, sigma = _normal(prior)
                if kept is None:
                    z = mean + sigma * torch.randn_like(mean)
                else:
                    if index:
                        top = kept.pop() + self.enc_combine[len(kept)](s)
                    delta, factor = (
                        _normal(prior + self.posterior[index](top))
                        if index
                        else _normal(self.posterior[index](top))
                    )
                    z = delta + factor * torch.randn_like(delta)
                    log_q = _log_prob(z, delta, factor)
                    z = self.flows[index](z)
                    kl = kl + (log_q - _log_prob(z, mean, sigma)).sum((1, 2, 3))
                s = self.dec_combine[index](torch.cat([s, z], 1))
                index += 1
            if scale < len(self.groups) - 1:
                s = self.up[scale](s)
        for cell in self.post:
            s = cell(s)
        return self.image(F.elu(s)), kl

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        logits, kl = self(x)
        if x.shape[1] == 1:
            rec = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
        else:
            rec = -_log_prob(x, *_normal(logits)).sum((1, 2, 3))
        return (rec + kl).mean() + 1e-2 * self.regularisation()

    def regularisation(self) -> torch.Tensor:
        """Sum of the largest singular values, by power iteration for all matrices of a shape together, and of batch norm."""
        weights = defaultdict(list)
        for conv in self.convolutions:
            matrix = conv.weight_normalized.flatten(1)
            weights[matrix.shape].append(matrix)
        total: Any = 0.0
        for shape, matrices in weights.items():
            stack = torch.stack(matrices)
            with torch.no_grad():
                u = self.vectors.setdefault(shape, F.normalize(torch.randn(len(matrices), shape[0]), dim=1))
                for _ in range(4):
                    v = F.normalize(torch.bmm(u.unsqueeze(1), stack).squeeze(1), dim=1)
                    u = F.normalize(torch.bmm(stack, v.unsqueeze(2)).squeeze(2), dim=1)
                self.vectors[shape] = u
            total = total + torch.bmm(u.unsqueeze(1), torch.bmm(stack, v.unsqueeze(2))).sum()
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                total = total + part.weight.abs().max()
        return total


def make(name: str, layout: str) -> FamilyVAE:
    torch.manual_seed(0)
    model = FamilyVAE(**SETTINGS[name])
    return model.to(memory_format=getattr(torch, f"{layout}_format" if layout == "contiguous" else layout))


def training_step(model: FamilyVAE, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adamax(model.parameters(), 1e-3)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()

    return step


def evaluation(model: Any, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model.eval()(x)

    return run


def sampling(model: Any, n: int) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model.eval().sample(n)

    return run


def measure(name: str, layout: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, and how many times faster than the own model: {task: {provider: ...}}."""
    own, ours = make(name, layout), nf.accelerate(make(name, layout), progress=True)
    b = int(SETTINGS[name]["batch"])  # type: ignore[call-overload]
    x = torch.rand(b, own.images[0], own.images[1], own.images[1]).round()
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    results: dict[str, dict[str, float]] = {}

    def compare(task: str, runs: dict[str, Callable[[], None]]) -> None:
        times = take_turns(runs, rounds)
        results[task] = {who: series.summary()["median_ms"] for who, series in times.items()}
        ratios = {who: median_ratio(times["own"], series) for who, series in times.items()}
        shown = ", ".join(
            f"{who} {results[task][who]:.0f} ms ({ratio:.2f}x [{low:.2f} {high:.2f}])"
            for who, (ratio, low, high) in ratios.items()
        )
        print(f"{name} {layout} {task}: {shown}", flush=True)

    compare("training step", {"own": training_step(own, x), "accelerate": training_step(ours, x)})
    frozen = nf.freeze(ours)
    compare(
        "sampling", {"own": sampling(own, b), "accelerate": sampling(ours, b), "frozen": sampling(frozen, b)}
    )
    compare(
        "evaluation",
        {"own": evaluation(own, x), "accelerate": evaluation(ours, x), "frozen": evaluation(frozen, x)},
    )
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.family", description=__doc__)
    parser.add_argument("settings", nargs="*", default=["mnist", "cifar10"], help=f"of {', '.join(SETTINGS)}")
    parser.add_argument(
        "--layouts", nargs="+", default=["contiguous"], choices=["contiguous", "channels_last"]
    )
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    options = parser.parse_args(arguments)
    for name in options.settings:
        if name not in SETTINGS:
            parser.error(f"settings: {name!r} is none of {', '.join(SETTINGS)}")
    for name in options.settings:
        for layout in options.layouts:
            measure(name, layout, options.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
