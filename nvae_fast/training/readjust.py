"""Batch-norm statistics re-estimated for sampling at a temperature, cached beside the checkpoint.

Re-estimation takes hundreds of sampling passes. Its result depends only on the checkpoint, which of its weights are used,
temperature, passes and batch, which are the key of the cache file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nvae_fast.io import atomic_file
from nvae_fast.models import torch_files
from nvae_fast.models.inputs import group_temperatures
from nvae_fast.training import checkpoint

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

_FORMAT = "nvae_fast.batch_norm_statistics"
# A fixed seed, so that one cache file serves all seeds of sampling: statistics over thousands of images hardly
# depend on it.
_SEED = 0


def readjust(
    model: NVAE,
    source: Path | None,
    *,
    temperature: float | Sequence[float],
    passes: int,
    batch: int = 16,
    keep: bool = True,
    weights: str = "model",
    report: Callable[[str], None] = lambda text: None,
) -> Path | None:
    """Load readjusted batch-norm statistics into `model`, from the cache file beside `source` if there is one.

    Otherwise `passes` batches of `batch` images are sampled at `temperature`, and the file is written unless `keep` is
    False. source=None: no cache. weights: which weights of the checkpoint `model` has, "model" or "ema". report(text) is called
    with a message. Returns the path of the file, None when there is none. The model is in evaluation mode afterwards.
    """
    path = None
    temperatures = [float(t) for t in group_temperatures("readjust", temperature, model.config.num_groups)]
    differ = len(set(temperatures)) > 1
    shown = f"{temperatures[0]:g}-{temperatures[-1]:g}" if differ else f"{temperatures[0]:g}"
    key: dict[str, Any] = {}
    if source is not None:
        key = {
            "format": _FORMAT,
            "checkpoint": checkpoint.file_hash(source),
            "temperature": temperatures if differ else temperatures[0],
            "passes": passes,
            "batch": batch,
        }
        mark = ""
        if weights != "model":  # without it in files of versions without averages
            key["weights"], mark = weights, f"-{weights}"
        name = f"{source.stem}.bn-t{shown}-p{passes}-b{batch}-{key['checkpoint'][:16]}{mark}.pt"
        path = source.with_name(name)
        statistics = _read(path, key)
        if statistics is not None and _fits(model, statistics):
            model.load_state_dict({**model.state_dict(), **statistics})
            model.eval()
            report(f"batch-norm statistics from {path}")
            return path
    report(f"readjusting batch-norm statistics: {passes} passes of {batch} images at temperature {shown}")
    before = {name: value.clone() for name, value in model.state_dict().items() if _is_statistic(name)}
    model.readjust_batch_norm(temperature, passes=passes, batch=batch, seed=_SEED)
    model.eval()
    if path is None or not keep:
        return None
    after = {name: value.detach().cpu() for name, value in model.state_dict().items() if name in before}
    try:
        with atomic_file(path) as handle:
            torch_files.write({**key, "statistics": after}, handle)
    except OSError as error:
        report(f"not kept for the next time: cannot write {path}: {error.strerror}")
        return None
    report(f"kept in {path}")
    return path


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _fits(model: NVAE, statistics: dict[str, Any]) -> bool:
    own = {
        name: (value.shape, value.dtype) for name, value in model.state_dict().items() if _is_statistic(name)
    }
    return own == {name: (value.shape, value.dtype) for name, value in statistics.items()}


def _read(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The statistics of a cache file, None when it is missing, damaged or of another checkpoint."""
    if not path.exists():
        return None
    try:
        document = torch_files.read(path)
    except (torch_files.UnreadableFile, OSError):  # a damaged cache is computed again
        return None
    if not isinstance(document, dict) or any(document.get(name) != value for name, value in key.items()):
        return None
    statistics = document.get("statistics")
    if not isinstance(statistics, dict) or not all(isinstance(v, torch.Tensor) for v in statistics.values()):
        return None
    return statistics
