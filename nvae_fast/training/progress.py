"""Progress of a long job on stderr: tqdm's bar on a terminal, a new line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

MODES = ("auto", "plain", "none")
# Seconds between two redraws of a bar, and between two lines.
BAR_INTERVAL = 0.2
LINE_INTERVAL = 5.0


class Progress:
    """Progress of a job of `total` parts.

    label: name of the job ("train"). unit: name of a part ("step"). stream: where to write, stderr by default. mode:
    "auto" is a bar where the stream is a terminal and tqdm is installed, else lines; "plain" is lines; "none" shows no
    progress. quiet: show nothing, messages included. Raises ValueError for another mode.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        unit: str = "step",
        stream: TextIO | None = None,
        mode: str = "auto",
        quiet: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"Progress: mode (--progress) must be one of {', '.join(MODES)}, got {mode!r}")
        self.label, self.total, self.unit = label, max(total, 1), unit
        self.stream = stream if stream is not None else sys.stderr
        self.mode, self.quiet = "none" if quiet else mode, quiet
        self._bar: Any = None
        self._last = float("-inf")
        self._started = time.monotonic()
        self._first: float | None = None

    def update(self, done: float, text: str = "", *, count: str | None = None, force: bool = False) -> None:
        """Show that `done` parts are done, at most every few seconds unless `force` is True.

        count: shown in place of "done/total".
        """
        if self.mode == "none":
            return
        if self._first is None:
            self._first = done
            self._bar = self._make_bar(done)
        line = f"{self.label} {self.unit} {count or f'{int(done)}/{self.total}'}"
        line += f"  {text}" if text else ""
        if self._bar is not None:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(done - self._bar.n)
            if force:
                self._bar.refresh()
            return
        now = time.monotonic()
        if not force and now - self._last < LINE_INTERVAL:
            return
        self._last = now
        part, fresh = min(max(done / self.total, 0.0), 1.0), done - self._first
        left = (
            f"  left {clock((now - self._started) / fresh * (self.total - done))}"
            if fresh > 0 and part < 1
            else ""
        )
        # The time left comes first: a narrow terminal cuts or wraps the end of the line.
        self._write(f"{part:4.0%}{left}  {line}")

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        elif not self.quiet:
            self._write(text)

    def close(self) -> None:
        """End the bar, so that later output starts on a new line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self.mode = "none"

    def _make_bar(self, done: float) -> Any:
        """tqdm's bar, beginning with the parts that were done before; None where lines are written."""
        if self.mode != "auto" or not getattr(self.stream, "isatty", lambda: False)():
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(
            total=self.total,
            initial=done,
            file=self.stream,
            mininterval=BAR_INTERVAL,
            miniters=0,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {bar:20} left {remaining}  {desc}",
        )

    def _write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()


def clock(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    total = int(max(seconds, 0.0))
    hours, rest = divmod(total, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
