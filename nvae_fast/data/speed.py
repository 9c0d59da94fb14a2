"""How many threads read images, and how fast a loader is."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from .dataset import ImageDataset
from .held_out import SomeImages
from .lazy import LazyImages
from .loader import BatchLoader

# Threads, not processes: an image of 256x256 pixels takes 1.2 to 1.4 ms of CPU time with threads and 1.9 ms with processes
# (JPEG), 0.5 to 0.7 and 1.2 ms (raw LMDB), because nothing is copied between processes. Four threads wait for the
# interpreter lock for 3 to 10 % (JPEG) or 20 % (raw LMDB) of their time; more of them would wait more.
_MOST_WORKERS = 4


def cpu_count() -> int:
    """CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def default_workers(dataset: ImageDataset, processes: int = 1) -> int:
    """The threads that read images ahead where none are asked for.

    dataset: the images. processes: how many share the CPUs of this machine. Returns 0 for images held as an array, whose
    batches take microseconds, else one for each CPU of this process beside the one that trains: 1 to 4.
    """
    source = getattr(dataset, "source", None)
    if not isinstance(source.whole if isinstance(source, SomeImages) else source, LazyImages):
        return 0
    return min(max(cpu_count() // max(processes, 1) - 1, 1), _MOST_WORKERS)


@dataclass(frozen=True)
class LoaderSpeed:
    """The result of `loader_speed`. images: how many were read; seconds: in what time; batch_size, workers: those used."""

    images: int
    seconds: float
    batch_size: int
    workers: int

    @property
    def images_per_second(self) -> float:
        """Images read in a second."""
        return self.images / self.seconds


def loader_speed(
    dataset: ImageDataset, *, batch_size: int = 32, workers: int | None = None, seconds: float = 3.0
) -> LoaderSpeed:
    """Read shuffled batches, epoch after epoch, for a time, and do nothing else.

    dataset: as :func:`open_dataset` gives it; with ``cache_bytes=0`` every image is decoded each time. batch_size: images in a
    batch. workers: threads that read ahead; None for those that training would have. seconds: the time, which the batches in
    preparation at its end exceed. Raises ValueError for numbers out of range.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected a number greater than 0, got {seconds!r}")
    workers = default_workers(dataset) if workers is None else workers
    loader = BatchLoader(dataset, batch_size, seed=0, shuffle=True, drop_last=False, workers=workers)
    images, epoch, started = 0, 0, time.perf_counter()
    elapsed = 0.0
    while elapsed < seconds:
        batches = loader.epoch(epoch)
        for batch in batches:
            images += len(batch)
            elapsed = time.perf_counter() - started
            if elapsed >= seconds:
                break
        epoch += 1
    return LoaderSpeed(images, elapsed, batch_size, workers)
