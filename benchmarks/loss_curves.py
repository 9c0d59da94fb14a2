"""``python -m benchmarks.loss_curves``: the fused path trains as the reference does, bfloat16 and float16 as float32.

One model from one seed is trained on the built-in images four times: with plain PyTorch in float32, with this
package's kernels in float32, and with them in bfloat16 and float16 autocast, the latter with a gradient scaler. A step
in which a gradient overflows is undone and made again with the lower scale, so that all curves see the same images.
Rounding differs and training amplifies it, so losses are compared as means over windows of ten steps (of one step as well,
for the record): float32 curves stay within 0.1 % of each other all the way, bfloat16 and float16 end within 1 % of float32.
Exit status 1 when they do not.

What training amplifies is its own doing: at too high a learning rate two runs of the reference part as well, when
one of them begins one rounding away. ``--control`` shows that distance, and each data set's learning rate is one at
which it stays below what is allowed, so that the comparison can tell a wrong kernel from chaos.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import nvae_fast as nf
from benchmarks import machine
from benchmarks.report import write_text
from nvae_fast.training import Step, TrainingConfig, kl_coefficient, learning_rate, preset, seeds

DATA = ("digits", "photos")
VARIANTS = {  # backend, autocast
    "reference": ("reference", None),
    "nvae_fast": ("auto", None),
    "nvae_fast bf16": ("auto", "bf16"),
    "nvae_fast fp16": ("auto", "fp16"),
}
CONTROL = "reference, one rounding away"
LEARNING_RATES = {"digits": 1e-2, "photos": 1e-3}  # peak
WINDOW = 10
FP32_TOLERANCE, LOW_TOLERANCE = 1e-3, 1e-2
SEED = 1


def model_config(data: str) -> Any:
    """The model of ``make demo``, for these images."""
    return preset("digits_demo").model_config().replace(dataset=data)


def curve(
    data: str, config: Any, training: TrainingConfig, variant: str, device: torch.device, steps: int
) -> list[float]:
    """The loss of every step."""
    backend, autocast = VARIANTS.get(variant, VARIANTS["reference"])
    training = training.replace(autocast=autocast, max_steps=steps)
    dataset = nf.data.open_dataset(data, split="train", image_size=config.resolution)
    loader = nf.data.BatchLoader(
        dataset,
        training.batch_size,
        seed=seeds.mix_seed(SEED, seeds.DATA),
        shuffle=True,
        flip=training.horizontal_flip,
        drop_last=True,
    )
    torch.manual_seed(SEED)
    losses = []
    with nf.use_backend(backend), _deterministic(device):
        model = nf.NVAE(config).to(device).to(memory_format=torch.channels_last).train()
        if variant == CONTROL:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + torch.finfo(parameter.dtype).eps)
        step = Step(model, training)
        for number, x in zip(range(steps), _batches(loader), strict=False):
            x = x.to(device).contiguous(memory_format=torch.channels_last)
            options: dict[str, Any] = dict(
                seed=seeds.mix_seed(SEED, seeds.NOISE, number),
                coefficient=kl_coefficient(
                    number, steps, training.kl_anneal_portion, training.kl_const_portion
                ),
                weight=training.weight_decay_norm,
                learning_rate=learning_rate(
                    number,
                    steps,
                    peak=training.learning_rate,
                    minimum=training.learning_rate_min,
                    warmup_steps=training.warmup_epochs * len(loader),
                ),
            )
            result = step(x, **options)
            while result.rescaled:
                result = step(x, **options)
            if result.skipped:
                raise FloatingPointError(f"{data}, {variant}: step {number} was not finite")
            losses.append(result.loss)
    return losses


def _batches(loader: Any) -> Iterator[torch.Tensor]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """TF32 and the choice of algorithms by measurement are no part of the comparison."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = False, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before


def windows(losses: list[float], size: int = WINDOW) -> list[float]:
    """Means over windows of ``size`` steps, the last one possibly longer."""
    count = max(len(losses) // size, 1)
    edges = [*range(0, count * size, size), len(losses)]
    return [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def compare(curves: dict[str, list[float]]) -> dict[str, Any]:
    """The differences, relative to the reference, and whether they are what is promised."""

    def differences(a: list[float], b: list[float]) -> list[float]:
        return [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]

    plain, fused = curves["reference"], curves["nvae_fast"]
    found: dict[str, Any] = {
        "fp32_largest": max(differences(windows(fused), windows(plain))),
        "fp32_largest_single_step": max(differences(fused, plain)),
        "fp32_end": differences(windows(fused), windows(plain))[-1],
        "fp32_allowed": FP32_TOLERANCE,
    }
    passed = found["fp32_largest"] <= FP32_TOLERANCE
    for name, (_, autocast) in VARIANTS.items():
        if autocast is None or name not in curves:
            continue
        parted = differences(windows(curves[name]), windows(fused))
        found[f"{autocast}_largest"], found[f"{autocast}_end"] = max(parted), parted[-1]
        found[f"{autocast}_end_allowed"] = LOW_TOLERANCE
        passed = passed and parted[-1] <= LOW_TOLERANCE
    if CONTROL in curves:
        found["control_largest"] = max(differences(windows(curves[CONTROL]), windows(plain)))
    found["passed"] = passed
    return found


def run(
    names: list[str],
    device: torch.device,
    steps: int,
    *,
    batch: int = 32,
    learning_rate: float | None = None,
    control: bool = False,
    changes: dict[str, Any] | None = None,
    variants: Iterable[str] = VARIANTS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All curves and their comparison as a document. learning_rate: peak, None for that of ``LEARNING_RATES``;
    control: the reference's distance from itself as well; changes, variants: of the model and what to train, for tests."""
    document = machine.describe(device)
    document["kernels"] = {op: row[device.type] for op, row in nf.backends().items()}
    document["settings"] = {"steps": steps, "batch": batch, "window": WINDOW, "seed": SEED}
    document["data"] = {}
    for data in names:
        config = model_config(data).replace(**(changes or {}))
        images = len(nf.data.open_dataset(data, split="train"))
        # A warm-up over a tenth of the run, in epochs.
        peak = LEARNING_RATES[data] if learning_rate is None else learning_rate
        training = TrainingConfig(
            batch_size=batch,
            learning_rate=peak,
            learning_rate_min=peak / 100,
            warmup_epochs=steps / 10 / max(images // batch, 1),
        )
        curves: dict[str, list[float]] = {}
        for variant in [*variants, *([CONTROL] if control else [])]:
            started = time.perf_counter()
            curves[variant] = curve(data, config, training, variant, device, steps)
            seconds = time.perf_counter() - started
            say(
                f"{data}  {variant}: {steps} steps, {seconds:.0f} s, ends at {windows(curves[variant])[-1]:.3f}"
            )
        comparison = compare(curves)
        ends = ", ".join(
            f"{low} ends {comparison[f'{low}_end']:.2e}"
            for low in ("bf16", "fp16")
            if f"{low}_end" in comparison
        )
        say(
            f"{data}  float32 differs by at most {comparison['fp32_largest']:.2e} (one step "
            f"{comparison['fp32_largest_single_step']:.2e}, allowed {FP32_TOLERANCE:g}); {ends} away "
            f"(allowed {LOW_TOLERANCE:g}): "
            f"{'passed' if comparison['passed'] else 'FAILED'}"
        )
        if control:
            say(f"{data}  the reference itself, begun one rounding away: {comparison['control_largest']:.2e}")
        document["data"][data] = {"comparison": comparison, "learning_rate": peak, "curves": curves}
    return document


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 when curves part, 2 for wrong arguments."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.loss_curves", description=__doc__.splitlines()[0])
    p.add_argument("data", nargs="*", help=f"built-in images (default: {' '.join(DATA)})")
    p.add_argument("--steps", type=int, default=300, help="optimizer steps (default 300)")
    p.add_argument("--batch", type=int, default=32, help="images a step (default 32)")
    p.add_argument("--learning-rate", type=float, help="peak (default: each data set's own, see --control)")
    p.add_argument("--control", action="store_true", help="also how far the reference parts from itself")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write every loss and the comparison there")
    arguments = p.parse_args(argv)
    names = arguments.data or list(DATA)
    try:
        unknown = [name for name in names if name not in DATA]
        if unknown:
            raise ValueError(f"no such images: {', '.join(unknown)}; there are: {', '.join(DATA)}")
        for option in ("steps", "batch", "threads"):
            value = getattr(arguments, option)
            if value is not None and value < 1:
                raise ValueError(f"--{option} must be at least 1, got {value}")
        if arguments.learning_rate is not None and not arguments.learning_rate > 0:
            raise ValueError(f"--learning-rate must be positive, got {arguments.learning_rate}")
        device = machine.resolve_device(arguments.device)
    except ValueError as error:
        p.error(str(error))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    document = run(
        names,
        device,
        arguments.steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        control=arguments.control,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return 0 if all(entry["comparison"]["passed"] for entry in document["data"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
