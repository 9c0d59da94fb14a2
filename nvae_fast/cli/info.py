"""`python -m nvae_fast info`: versions, devices, which backend runs what and why, and how fast images are read."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from nvae_fast.cli import options
from nvae_fast.cli.common import versions
from nvae_fast.data import loader_speed, open_dataset
from nvae_fast.ops import _backend
from nvae_fast.ops import _extension as extension
from nvae_fast.training.config import check_bounds


def run(arguments: argparse.Namespace) -> int:
    """Print versions, devices and the backend of every operation; with --data, the speed of the loader."""
    data = None if arguments.data is None else _data(arguments)
    report: dict[str, Any] = {
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "cpu_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "extension": _extension(),
        "missing": _backend.missing(),
        "backends": _backend.backends(),
    }
    if data is not None:
        report["data"] = data
    if arguments.json:
        print(json.dumps(report, indent=2, default=str))
        return 0
    for title in ("versions", "machine", "extension", "missing"):
        print(title if report[title] else f"{title}: nothing")
        for name, value in report[title].items():
            print(f"  {name:<16} {_short(value)}")
    print("backends")
    for op, devices in report["backends"].items():
        print(f"  {op}")
        for device, value in devices.items():
            print(f"    {device:<6} {_short(value)}")
    if data is not None:
        print("data")
        for name, value in data.items():
            print(f"  {name:<16} {_short(value)}")
    return 0


def _data(arguments: argparse.Namespace) -> dict[str, Any]:
    """What --data holds, and the speed of a loader of it."""
    options.check_numbers(arguments, "image_size", "batch_size")
    options.check_numbers(arguments, "workers", least=0, most=1024)
    check_bounds("--seconds", arguments.seconds, above=0, most=600)
    dataset = open_dataset(
        arguments.data,
        kind=arguments.data_kind,
        image_size=arguments.image_size,
        crop=arguments.crop,
        resample=arguments.resample,
        max_skipped=arguments.max_skipped_images,
        cache_bytes=0,
        num_bits=8,
        binarize=False,
    )
    speed = loader_speed(
        dataset, batch_size=arguments.batch_size, workers=arguments.workers, seconds=arguments.seconds
    )
    return {
        "source": arguments.data,
        "images": len(dataset),
        "size": f"{dataset.channels}x{dataset.image_size}x{dataset.image_size}",
        "skipped": len(dataset.skipped),
        "batch_size": speed.batch_size,
        "workers": speed.workers,
        "images_read": speed.images,
        "seconds": round(speed.seconds, 3),
        "images_per_second": round(speed.images_per_second, 1),
    }


def _extension() -> dict[str, Any]:
    loaded = extension.load()
    return {"loaded": loaded, "reason": extension.reason(), **extension.info()}


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)
