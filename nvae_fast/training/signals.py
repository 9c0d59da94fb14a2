"""Stop signals: SIGTERM and Ctrl-C let the current step finish, a second Ctrl-C ends the process.

Python runs signal handlers between two of its own instructions. A process that waits for another one inside a
collective operation runs none, for as long as the other process hangs. So a thread reads the signals as well, from the
descriptor of :func:`signal.set_wakeup_fd`, and ends the process on the second Ctrl-C when nothing else does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

EXIT_GRACE = 1.0  # seconds in which the main thread may answer a Ctrl-C itself
_END = 0  # no signal has this number: it ends the thread

_watching = False


class StopRequest:
    """Context manager that records the first SIGTERM or SIGINT in `.signal`, in place of its default action.

    A second SIGINT raises KeyboardInterrupt. Signals can be handled in the main thread only; in another thread this
    does nothing and `.signal` stays None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        self._stack.enter_context(watch_interrupts())
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self._stack.close()

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
            _write(f"\n{name}: finishing this step, then saving (Ctrl-C again aborts at once)\n")


@contextlib.contextmanager
def watch_interrupts() -> Iterator[None]:
    """While entered, the second Ctrl-C ends the process with code 130, even while the main thread waits for another process.

    Has no effect outside the main thread, and inside another such block.
    """
    global _watching
    if _watching or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    left = threading.Event()
    thread = threading.Thread(target=_watch, args=(reader, left), name="interrupts", daemon=True)
    _watching = True
    thread.start()
    try:
        yield
    finally:
        _watching = False
        left.set()
        signal.set_wakeup_fd(before)
        with contextlib.suppress(OSError):
            os.write(writer, bytes([_END]))
        thread.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, left: threading.Event) -> None:
    """Count the signals written to `reader`; end the process on the second SIGINT unless `left` is set in time."""
    interrupts = 0
    while True:
        numbers = os.read(reader, 64)
        if _END in numbers:
            return
        interrupts += numbers.count(signal.SIGINT)
        if interrupts < 2:
            continue
        if left.wait(EXIT_GRACE):
            return
        _write("\nnvae_fast: aborted; checkpoints written before are intact\n")
        os._exit(128 + signal.SIGINT)


def _write(text: str) -> None:
    # sys.stderr may be in the middle of a write; the descriptor itself takes no lock.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
