"""Stopping when asked: the first SIGTERM or SIGINT lets the current step finish, a second SIGINT aborts."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, remembers the first SIGTERM or SIGINT in `.signal` instead of dying of it.

    Signals can be handled in the main thread only; elsewhere this does nothing and `.signal` stays None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @property
    def exit_code(self) -> int:
        """0, or 128 + signal (130 for SIGINT, 143 for SIGTERM) as shells and schedulers expect."""
        return 0 if self.signal is None else 128 + self.signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            name = signal.Signals(number).name
            note = f"\n{name}: finishing this step, then saving (Ctrl-C again aborts at once)\n"
            # sys.stderr may be in the middle of a write right now; the descriptor itself takes no lock.
            with contextlib.suppress(OSError):
                os.write(2, note.encode())
