"""A memory-mapped file that fails in the middle of a read ends a command with the name of the file."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import random_pixels, write_lmdb
from internals import needs_extension

# The reader looks at the size of the file before every read. Here the file loses its pages between the two.
READ = """
import faulthandler, os, sys
import nvae_fast as nf
from nvae_fast.cli.common import open_images
folder, earlier_handler = sys.argv[1:]
if earlier_handler == "True":
    faulthandler.enable()
dataset = open_images(folder, None, "train", nf.NVAEConfig(dataset="digits", image_channels=3, likelihood="normal"))
stat, lost = os.stat, os.path.join(folder, "data.mdb")
def stat_then_truncate(path, *rest, **named):
    found = stat(path, *rest, **named)
    if str(path) == lost:
        os.truncate(lost, 8192)
    return found
os.stat = stat_then_truncate
dataset.batch([59], 0)
"""


@needs_extension
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the handler reads /proc/self/maps")
@pytest.mark.parametrize("earlier_handler", [False, True])
def test_the_file_is_named(tmp_path: Path, earlier_handler: bool) -> None:
    write_lmdb(tmp_path / "db", [random_pixels(40, 40, 3, seed=i).tobytes() for i in range(60)])
    run = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "db"), str(earlier_handler)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == -signal.SIGBUS, (run.returncode, run.stderr[-2000:])
    assert f"bus error while reading {tmp_path / 'db' / 'data.mdb'}: the file was truncated" in run.stderr
    assert ("most recent call first" in run.stderr) == earlier_handler, "the handler before runs too"


@needs_extension
def test_a_signal_from_outside_ends_the_process_as_before() -> None:
    code = (
        "from internals import _extension; import os; _extension.report_bus_errors(); os.kill(os.getpid(), 7)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent
    )
    assert run.returncode == -signal.SIGBUS
    assert "bus error" not in run.stderr
