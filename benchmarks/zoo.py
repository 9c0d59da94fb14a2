"""``python -m benchmarks.zoo``: models of timm and torchvision before and after accelerate, which makes none slower.

Both libraries must be installed. Own and accelerated model take turns. The ratio is the median of those of all rounds, with
its 95 % interval; with one thread (OMP_NUM_THREADS=1) of processor time.
"""

from __future__ import annotations

import argparse
import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import nvae_fast as nf
from benchmarks.timing import median_ratio, take_turns

MODELS = (
    "timm:efficientnet_b0", "timm:mobilenetv3_large_100", "timm:tf_efficientnetv2_s", "timm:regnety_002", "timm:mnasnet_100",
    "timm:mobilenetv2_100", "timm:ghostnet_100", "timm:semnasnet_100", "timm:fbnetc_100", "timm:mixnet_s", "timm:resnet18",
    "timm:convnext_atto", "timm:seresnet18", "torchvision:efficientnet_b0", "torchvision:mobilenet_v3_large",
    "torchvision:mobilenet_v3_small", "torchvision:efficientnet_v2_s", "torchvision:regnet_y_400mf", "torchvision:mnasnet1_0",
    "torchvision:shufflenet_v2_x1_0",
)  # fmt: skip


def make(name: str) -> nn.Module:
    library, model = name.split(":")
    torch.manual_seed(0)
    if library == "timm":
        created: nn.Module = importlib.import_module("timm").create_model(model)
        return created
    found: nn.Module = getattr(importlib.import_module("torchvision.models"), model)()
    return found


def _run(model: nn.Module, x: torch.Tensor, training: bool) -> Callable[[], None]:
    def run() -> None:
        model.train(training)
        with torch.set_grad_enabled(training):
            y: Any = model(x)
        if training:
            model.zero_grad()
            y.square().mean().backward()

    return run


def measure(name: str, layout: str, batch: int, side: int, rounds: int, sampled: bool) -> None:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    own = make(name).to(memory_format=form)
    x = torch.randn(batch, 3, side, side).to(memory_format=form)
    ours = nf.accelerate(copy.deepcopy(own), sample_input=x if sampled else None)
    replaced = len(nf.acceleration_report(ours).replaced)
    for training in (False, True):
        mode = "training" if training else "evaluation"
        times = take_turns({"own": _run(own, x, training), "accelerate": _run(ours, x, training)}, rounds)
        ratio, low, high = median_ratio(times["own"], times["accelerate"])
        print(
            f"{name} {layout} {mode}: {times['own'].summary()['median_ms']:.0f} ms, {ratio:.3f}x [{low:.3f} {high:.3f}], "
            f"{replaced} parts",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument(
        "models", nargs="*", default=list(MODELS), help="library:model; default: twenty of them"
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["contiguous", "channels_last"],
        choices=["contiguous", "channels_last"],
    )
    parser.add_argument("--batch", type=int, default=8, help="default: 8")
    parser.add_argument("--side", type=int, default=128, help="of the images; default: 128")
    parser.add_argument("--rounds", type=int, default=21, help="default: 21")
    parser.add_argument("--sample-input", action="store_true", help="measure at accelerate time")
    options = parser.parse_args(arguments)
    for name in options.models:
        for layout in options.layouts:
            measure(name, layout, options.batch, options.side, options.rounds, options.sample_input)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
