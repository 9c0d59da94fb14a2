"""What is shown while parts are compared, and the threads that it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

_SHOWN_AFTER = 1.0  # seconds
_EVERY = 0.2


class Progress:
    """A line on stderr: what is done, how much of it, and for how long. It is shown when that takes over a second.

    Args:
        what: what is done.
        total: how many steps it has.
        shown: None: where stderr is a terminal.
    """

    def __init__(self, what: str, total: int, shown: bool | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.shown = sys.stderr.isatty() if shown is None else shown
        self.started = self.last = time.monotonic()
        self.written = False

    def __enter__(self) -> Progress:
        return self

    def advance(self) -> None:
        """Count a step."""
        self.done += 1
        now = time.monotonic()
        if self.shown and now - self.started > _SHOWN_AFTER and now - self.last > _EVERY:
            self._write(now)

    def _write(self, now: float) -> None:
        self.last, self.written = now, True
        print(
            f"\r{self.what}: {self.done} of {self.total}, {now - self.started:.0f} s",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.written:
            self._write(time.monotonic())
            print(file=sys.stderr, flush=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which PyTorch computes on one thread: small inputs gain nothing from more, and other work may run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
