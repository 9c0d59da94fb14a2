"""Threads that read images, the cache of decoded ones, and the speed of a loader alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from training_runs import TINY_TRAINING, tiny_model

from nvae_fast import cli
from nvae_fast.data import default_workers, loader_speed, memory, open_dataset, speed
from nvae_fast.training import Trainer
from nvae_fast.training.launch import processes_here

MB = 1 << 20


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 12 gray PNG images of 32x32 pixels, 1 KiB each when decoded."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(12):
        image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.mark.parametrize(
    "cpus, processes, workers",
    [(1, 1, 1), (2, 1, 1), (4, 1, 3), (64, 1, 4), (16, 8, 1), (32, 8, 3), (4, 8, 1)],
)
def test_threads_by_the_cpus_of_each_process(cpus, processes, workers, images, monkeypatch):
    monkeypatch.setattr(speed, "cpu_count", lambda: cpus)
    assert default_workers(open_dataset(images), processes) == workers
    assert default_workers(open_dataset("digits"), processes) == 0


def test_a_run_reads_with_the_threads_of_its_machine_unless_a_number_is_given(images, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "cpu_count", lambda: 8)
    dataset = open_dataset(images)

    def workers(**changes) -> int:
        return Trainer(
            tiny_model(), TINY_TRAINING.replace(**changes), dataset, tmp_path, quiet=True
        ).loader.workers

    assert workers() == 4
    assert workers(workers=0) == 0
    assert workers(workers=7) == 7
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert workers() == 1


def test_the_processes_of_a_machine_are_those_the_launcher_says():
    torchrun = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert processes_here(torchrun) == 8
    assert processes_here({**torchrun, "LOCAL_WORLD_SIZE": "8"}) == 8
    assert processes_here({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}) == 1
    assert processes_here({}) == 1
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE must be a whole number >= 1, got 'x'"):
        processes_here({**torchrun, "LOCAL_WORLD_SIZE": "x"})


def test_all_decoded_images_are_kept_or_none(images, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    size = 12 * 32 * 32
    for most, kept in ((size, True), (size - 1, False), (0, False)):
        dataset = open_dataset(images, cache_bytes=most)
        decoded = []
        monkeypatch.setattr(
            dataset.source,
            "decode",
            lambda index, source=dataset.source, decoded=decoded: (
                decoded.append(index) or type(source).decode(source, index)
            ),
        )
        first = dataset.batch(range(12), 0)
        count = len(decoded)
        assert (dataset.batch(range(12), 0) == first).all()
        assert (len(decoded) == count) == kept


@pytest.mark.parametrize(
    "free, processes, kept",
    [(2 * MB, 1, True), (2 * MB - 1, 1, False), (4 * MB, 2, True), (3 * MB, 2, False)],
)
def test_a_cache_takes_at_most_half_of_the_free_memory(free, processes, kept, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert memory.fits(MB, 10 * MB) == kept


def test_free_memory_is_that_of_the_machine_or_of_the_container(tmp_path):
    assert memory.available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     700 kB\n")
    assert memory.available_memory(tmp_path) == 700 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("4096\n")
    assert memory.available_memory(tmp_path) == 700 * 1024
    (group / "memory.max").write_text("104096\n")
    assert memory.available_memory(tmp_path) == 100_000


@pytest.mark.parametrize("value", [-1, 0.5, True, "1"])
def test_a_wrong_bound_of_the_cache_is_named(value, images):
    with pytest.raises(
        ValueError, match=r"cache_bytes \(--cache\): expected a number of bytes of at least 0"
    ):
        open_dataset(images, cache_bytes=value)


def test_train_takes_the_bound_in_gib(images, tmp_path, capsys):
    words = ["train", "--data", str(images), "--dataset", "digits", "--out", str(tmp_path / "run"), "--cache"]
    assert cli.main([*words, "-1"]) == 2
    assert "--cache must be at least 0, got -1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    from nvae_fast.cli.common import image_options

    arguments = cli.parse([*words, "0.5"])
    assert image_options(arguments, SimpleNamespace(dataset="digits"), None)["cache_bytes"] == 1 << 29


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_is_timed_until_the_time_is_over(workers, images, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    result = loader_speed(open_dataset(images), batch_size=5, workers=workers, seconds=4)
    # One second a batch: 5, 5 and 2 images, and the first batch of the next epoch.
    assert (result.images, result.seconds, result.images_per_second) == (17, 4, 4.25)
    assert (result.batch_size, result.workers) == (5, workers)


def test_info_shows_the_speed_of_the_loader_alone(images, capsys):
    words = ["info", "--data", str(images), "--seconds", "0.01", "--batch-size", "4", "--workers", "1"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["data"]
    assert (found["images"], found["size"], found["batch_size"], found["workers"]) == (12, "1x32x32", 4, 1)
    assert found["images_read"] >= 4
    assert found["images_per_second"] > 0
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    for name in ("images_per_second", "batch_size", "workers"):
        assert name in text
    assert cli.main(["info", "--json"]) == 0
    assert "data" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--batch-size", "0", "--batch-size must be at least 1, got 0"),
        ("--workers", "-1", "--workers must be at least 0, got -1"),
        ("--seconds", "0", "--seconds must be greater than 0, got 0"),
        ("--image-size", "0", "--image-size must be at least 1, got 0"),
    ],
)
def test_info_names_a_wrong_option(option, value, message, images, capsys):
    assert cli.main(["info", "--data", str(images), option, value]) == 2
    assert message in capsys.readouterr().err
