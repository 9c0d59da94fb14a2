"""``python -m benchmarks.zoo``: models of timm and torchvision before accelerate, after it, and frozen.

Both libraries must be installed. Own and accelerated forwards take turns in one model: of two copies in other places of the
memory either may be a few hundredths slower. The ratio is the median of those of all rounds, with
its 95 % interval; with one thread (OMP_NUM_THREADS=1) of processor time.
"""

from __future__ import annotations

import argparse
import importlib
from functools import partial
from typing import Any

import torch
from torch import nn

import nvae_fast as nf
from benchmarks.timing import median_ratio, take_turns
from nvae_fast.patching.bound import bound_forward, remove

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


def measure(
    name: str, layout: str, batch: int, side: int, rounds: int, sampled: bool
) -> dict[tuple[str, str], str]:
    """Return, for (mode, layout), how many times faster accelerate makes the model, with the interval.

    "frozen": of a frozen copy, in evaluation.
    """
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = make(name).to(memory_format=form)
    x = torch.randn(batch, 3, side, side).to(memory_format=form)
    nf.accelerate(model, sample_input=x if sampled else None)
    bound = [found for found in map(bound_forward, model.modules()) if found is not None]
    frozen = nf.freeze(model)

    def switch(provider: str) -> None:
        model.zero_grad()
        for forward in bound:
            if provider == "accelerate":
                forward.install()
            else:
                remove(forward.module)

    def run(training: bool, model: nn.Module = model) -> None:
        with torch.set_grad_enabled(training):
            y: Any = model(x)
        if training:
            y.square().mean().backward()

    found: dict[tuple[str, str], str] = {}
    for mode in ("training", "evaluation"):
        training = mode == "training"
        model.train(training)
        runs = dict.fromkeys(("own", "accelerate"), partial(run, training))
        if not training:
            runs["frozen"] = partial(run, training, frozen)
        times = take_turns(runs, rounds, switch)
        for provider in ("accelerate", "frozen")[: len(runs) - 1]:
            ratio, low, high = median_ratio(times["own"], times[provider])
            what = mode if provider == "accelerate" else provider
            found[what, layout] = f"{ratio:.3f} [{low:.3f} {high:.3f}]"
            own = times["own"].summary()["median_ms"]
            print(
                f"{name} {layout} {what}: {own:.0f} ms, {found[what, layout]}, {len(bound)} parts", flush=True
            )
    return found


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
    columns = [(mode, layout) for mode in ("training", "evaluation", "frozen") for layout in options.layouts]
    lines = [
        f"| model | {' | '.join(f'{mode}, {layout}' for mode, layout in columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name in options.models:
        found: dict[tuple[str, str], str] = {}
        for layout in options.layouts:
            found |= measure(name, layout, options.batch, options.side, options.rounds, options.sample_input)
        lines.append(f"| {name.replace(':', ' ')} | {' | '.join(found[column] for column in columns)} |")
    print("\n".join(["", *lines]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
