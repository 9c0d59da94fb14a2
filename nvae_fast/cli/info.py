"""`python -m nvae_fast info`: versions, devices, and which backend runs what and why."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from nvae_fast.cli.common import versions
from nvae_fast.ops import _backend
from nvae_fast.ops import _extension as extension


def run(arguments: argparse.Namespace) -> int:
    """Print versions, devices and the backend of every operation."""
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
    return 0


def _extension() -> dict[str, Any]:
    loaded = extension.load()
    return {"loaded": loaded, "reason": extension.reason(), **extension.info()}


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)
