"""Progress of a long job on stderr: one line that is redrawn on a terminal, a new line every few seconds elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

BAR_WIDTH = 20
# Seconds between two redraws of a terminal line, and between two lines of a log file.
TERMINAL_INTERVAL = 0.2
LOG_INTERVAL = 5.0


class Progress:
    """Progress of a job of `total` parts.

    label: name of the job ("train"). unit: name of a part ("step"). quiet: show nothing.
    """

    def __init__(
        self, label: str, total: int, *, unit: str = "step", stream: TextIO | None = None, quiet: bool = False
    ) -> None:
        self.label, self.total, self.unit = label, max(total, 1), unit
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = quiet
        self.terminal = bool(getattr(self.stream, "isatty", lambda: False)())
        self._last = float("-inf")
        self._width = 0
        self._started = time.monotonic()
        self._first: float | None = None

    def update(self, done: float, text: str = "", *, count: str | None = None, force: bool = False) -> None:
        """Show that `done` parts are done, at most every few seconds unless `force` is True.

        count: shown in place of "done/total".
        """
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if self.quiet or (
            not force and now - self._last < (TERMINAL_INTERVAL if self.terminal else LOG_INTERVAL)
        ):
            return
        self._last = now
        part = min(max(done / self.total, 0.0), 1.0)
        filled = round(part * BAR_WIDTH)
        bar = "#" * filled + "-" * (BAR_WIDTH - filled)
        line = f"{self.label} [{bar}] {part:4.0%} {self.unit} {count or f'{int(done)}/{self.total}'}"
        if text:
            line += f"  {text}"
        fresh = done - self._first
        if fresh > 0 and part < 1:
            line += f"  left {clock((now - self._started) / fresh * (self.total - done))}"
        self._show(line)

    def message(self, text: str) -> None:
        """Print a line above the progress line."""
        if self.terminal and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """End the line on a terminal, so that later output starts on a new line."""
        if self.terminal and self._width:
            self.stream.write("\n")
            self.stream.flush()
            self._width = 0

    def _show(self, line: str) -> None:
        if not self.terminal:
            self.stream.write(line + "\n")
        else:
            columns = shutil.get_terminal_size().columns
            line = line[: max(columns - 1, 20)]
            self.stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        self.stream.flush()


def clock(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    total = int(max(seconds, 0.0))
    hours, rest = divmod(total, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
