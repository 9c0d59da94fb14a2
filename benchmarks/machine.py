"""Where and with what numbers were measured."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import nvae_fast as nf

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    """The CPU's marketing name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found.group(1).strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "cpu"


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug(name: str) -> str:
    """Lower-case words joined by hyphens, without trademark signs, clock rates and core counts."""
    name = re.sub(r"\((r|tm|c)\)", " ", name, flags=re.IGNORECASE)
    name = re.sub(r"@.*$|\b\d+-core\b|\bprocessor\b|\bcpu\b|\bwith radeon.*$", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def machine_name(device: torch.device) -> str:
    """``nvidia-h200`` for a GPU, ``amd-epyc-2core`` for a CPU."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    return f"{slug(processor())}-{cores()}core"


def resolve_device(asked: str) -> torch.device:
    """``auto`` is the GPU when there is one.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    return torch.device(asked)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, versions, commit and date, for the head of a results file."""
    commit, modified = _commit()
    facts: dict[str, Any] = {
        "machine": {
            "name": machine_name(device),
            "device": device.type,
            "processor": processor(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "nvae_fast": nf.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
        },
        "commit": commit,
        "modified": modified,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["machine"] |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
        }
        facts["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); measurements, README and docs do not count. None without
    git."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None, None
    status = _git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":!benchmarks/results",
        ":!README.md",
        ":!docs",
    )
    return commit, None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
