"""LMDB files with damaged pages, or that change while they are read: a clear error that names the file."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
from data_files import random_pixels, write_lmdb

from nvae_fast.data import open_dataset
from nvae_fast.data.lmdb_pages import check_file


def test_pages_of_a_sound_database_pass(tmp_path):
    for name, values in (
        ("small", [b"x" * (i % 50) for i in range(3000)]),
        ("large", [bytes(5000 + i) for i in range(300)]),
        ("empty", []),
    ):
        write_lmdb(tmp_path / name, values)
        check_file(tmp_path / name / "data.mdb")


def test_damaged_pages_end_in_an_error(tmp_path):
    """In a process of its own: without the check of the pages some of these end it with SIGBUS or SIGSEGV."""
    write_lmdb(tmp_path / "db", [random_pixels(40, 40, 3, seed=i).tobytes() for i in range(60)])
    code = """
import sys, pathlib, numpy as np
from nvae_fast.data import open_dataset
folder = pathlib.Path(sys.argv[1])
good = (folder / "db" / "data.mdb").read_bytes()
pages = np.frombuffer(good, np.uint8).reshape(-1, 4096)
flags = pages[:, 10].astype(int) | pages[:, 11].astype(int) << 8
tree = [i for i in range(len(pages)) if i < 2 or flags[i] in (1, 2)]
rng, refused = np.random.default_rng(0), 0
for trial in range(120):
    data = bytearray(good)
    for _ in range(3):
        page = tree[int(rng.integers(len(tree)))]
        # The header, the pointers, or the nodes at the end of the page.
        at = int(rng.integers(0, 200)) if rng.random() < 0.5 else int(rng.integers(2000, 4096))
        data[page * 4096 + at] = int(rng.integers(256))
    target = folder / f"t{trial}"
    target.mkdir()
    (target / "data.mdb").write_bytes(data)
    try:
        dataset = open_dataset(target, max_skipped=1)
        dataset.batch(range(len(dataset)), 0)
    except (ValueError, OSError) as error:
        refused += 1
        assert f"t{trial}" in str(error), error
    (target / "data.mdb").unlink()
print("refused", refused)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
    assert int(run.stdout.split()[1]) > 40, run.stdout


def test_a_database_that_shrinks_while_it_is_read(tmp_path, caplog):
    write_lmdb(tmp_path / "db", [random_pixels(40, 40, 3, seed=i).tobytes() for i in range(60)])
    dataset = open_dataset(tmp_path / "db")
    with caplog.at_level(logging.ERROR):
        os.truncate(tmp_path / "db" / "data.mdb", 8192)
        with pytest.raises(ValueError, match=r"data\.mdb has shrunk from \d+ to 8192 bytes"):
            dataset.batch([59], 0)
