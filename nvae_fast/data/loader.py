"""Batches that depend only on the seed: resumable anywhere, the same for any number of workers and ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from . import hashing
from .dataset import ImageDataset
from .integers import plain

_ORDER, _NOISE, _FLIP = (
    1,
    2,
    3,
)  # purposes, so that order, binarisation and flips are independent of each other
_AHEAD = 2  # batches in preparation per worker


class BatchLoader:
    """Batches of an `ImageDataset`, epoch by epoch. Iterating over the loader gives an epoch, and the next one each time.

    dataset: the images, as :func:`open_dataset` gives them.
    batch_size: images a process gets per step; the global batch is batch_size * world_size. Step k of an
        epoch takes the k-th global batch of the epoch's order and process `rank` the rank-th part of it, so
        that the parts, put together in rank order, are the batch that one process of that size would get.
    seed: any integer; order, binarisation and flips depend on (seed, epoch, sample index) alone.
    shuffle: a new order every epoch; False: by index.
    flip: mirror each image left-right with probability 1/2. RGB only; characters in one channel are left as
    they are.
    drop_last: leave out the last, incomplete global batch. False: it is shared out as evenly as possible
        (the first ranks get one more); every rank gets the same number of batches, some of which may then
        be empty, (0,C,H,W).
    workers: threads that prepare batches ahead (decoding and hashing release the interpreter lock); 0:
        none. They end with the iterator, also when it is left early. :func:`default_workers` gives a number.
    rank, world_size: which of how many processes this is.

    Raises ValueError for numbers out of range, and when no whole batch can be made of the images.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        flip: bool = False,
        drop_last: bool = True,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        batch_size, workers, rank, world_size, seed = map(
            plain, (batch_size, workers, rank, world_size, seed)
        )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("world_size", world_size, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} (world_size - 1), got {rank!r}")
        total = batch_size * world_size
        if drop_last and len(dataset) < total:
            raise ValueError(
                f"batch_size: {batch_size} x {world_size} process(es) = {total} is more than the "
                f"{len(dataset)} images of {dataset.name}, which leaves no whole batch; "
                f"use a smaller batch_size or drop_last=False"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = hashing.as_seed(seed)
        self.shuffle = shuffle
        self.flip = flip and dataset.channels == 3
        self.drop_last = drop_last
        self.workers = workers
        self.rank = rank
        self.world_size = world_size
        self._iterations = 0

    def __iter__(self) -> Iterator[Tensor]:
        """The batches of epoch 0 when it is called first, of epoch 1 the next time, and so on; see :meth:`epoch`."""
        self._iterations += 1
        return self.epoch(self._iterations - 1)

    def __len__(self) -> int:
        """Batches per epoch, the same for every rank."""
        total = self.batch_size * self.world_size
        return len(self.dataset) // total if self.drop_last else -(-len(self.dataset) // total)

    def indices(self, epoch: int) -> list[np.ndarray]:
        """The sample indices (n,) int64 of each of this rank's batches in epoch `epoch`."""
        count, total = len(self.dataset), self.batch_size * self.world_size
        order = (
            hashing.permutation(count, hashing.fold_seed(self.seed, epoch, _ORDER))
            if self.shuffle
            else np.arange(count)
        )
        parts = []
        for step in range(len(self)):
            whole = order[step * total : (step + 1) * total]
            share, extra = divmod(len(whole), self.world_size)
            start = self.rank * share + min(self.rank, extra)
            parts.append(whole[start : start + share + (self.rank < extra)])
        return parts

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Tensor]:
        """An iterator over the float32 (n,C,H,W) batches of epoch `epoch`, from batch `start_batch` on.

        The batches are those that `epoch(epoch)` gives after skipping the first `start_batch`, bit for bit,
        without computing them. Raises ValueError when either is out of range.
        """
        epoch, start_batch = plain(epoch), plain(start_batch)
        for name, value in (("epoch", epoch), ("start_batch", start_batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected an integer of at least 0, got {value!r}")
        if start_batch > len(self):
            raise ValueError(f"start_batch: an epoch has {len(self)} batches, got {start_batch}")
        return self._batches(epoch, self.indices(epoch)[start_batch:])

    def _load(self, epoch: int, index: np.ndarray) -> Tensor:
        batch = self.dataset.batch(index, hashing.fold_seed(self.seed, epoch, _NOISE))
        if self.flip and len(index):
            mirrored = torch.from_numpy(hashing.coin_flips(hashing.fold_seed(self.seed, epoch, _FLIP), index))
            batch[mirrored] = batch[mirrored].flip(-1)
        return batch

    def _batches(self, epoch: int, parts: list[np.ndarray]) -> Iterator[Tensor]:
        if self.workers == 0:
            for part in parts:
                yield self._load(epoch, part)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="nvae_fast-data")
        waiting: deque[Future[Tensor]] = deque()
        try:
            for part in parts:
                waiting.append(pool.submit(self._load, epoch, part))
                if len(waiting) >= self.workers * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
