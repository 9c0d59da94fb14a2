"""Train in processes that are killed at random moments, and compare with a run that is not.

    PYTHONPATH=. python tests/kills.py 100 /tmp/kills

Each process is a fork of one that has imported everything, so that a hundred of them take a minute.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from training_runs import TINY

import nvae_fast as nf
from nvae_fast.training import Trainer, TrainingConfig, checkpoint, run_folder


class Specks:
    """Sixty-four tiny images."""

    name, split, image_size, channels, skipped, binarize = "specks", "train", 8, 1, [], True

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = (torch.rand(64, 1, 8, 8, generator=generator) > 0.5).float()

    def __len__(self) -> int:
        return 64

    def batch(self, indices, seed):
        return self.pixels[torch.as_tensor(indices)].clone()


def train(folder: Path, steps: int, ready: int | None = None) -> None:
    """Start a run, or resume it as `train --resume` does; write to the descriptor ``ready`` before the first step."""
    config = TrainingConfig(
        batch_size=4, max_steps=steps, log_every=5, checkpoint_every=7, warmup_epochs=0.1, learning_rate=1e-3
    )
    state = None
    if any((folder / name).exists() for name in (checkpoint.NAME, checkpoint.PREVIOUS)):
        run_folder.prepare(folder, resume=True)
        state = checkpoint.load_training(folder)
        torch.manual_seed(99)
    else:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
    model = nf.NVAE(nf.NVAEConfig(**{**TINY, "image_size": 8, "num_groups_per_scale": 1}))
    run = Trainer(model, config, Specks(), folder, state=state, quiet=True)
    if ready is not None:
        os.write(ready, b".")
    run.run()


def in_a_process(work: Callable[[int], None], seconds: float | None = None) -> int:
    """Run ``work`` in a fork, killed so many ``seconds`` after it wrote to the descriptor that it is given.

    Returns the signal that ended it, 0 for none.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks: this process has no threads
        child = os.fork()
    if not child:
        code = 1
        try:
            work(writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    if seconds is not None:
        os.read(reader, 1)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_run(folder: Path, steps: int, kills: int, seed: int = 0) -> list[int]:
    """The step of the newest checkpoint after each of ``kills`` kills; then the run is finished."""
    chance, found = random.Random(seed), []
    while len(found) < kills:
        if (
            in_a_process(lambda ready: train(folder, steps, ready), chance.uniform(0.0, 0.25))
            != signal.SIGKILL
        ):
            raise AssertionError(f"the run ended after {len(found)} kills: give it more steps")
        whole = (folder / checkpoint.NAME).exists()
        found.append(checkpoint.load(folder)["progress"]["step"] if whole else 0)
    in_a_process(lambda ready: train(folder, steps))
    return found


if __name__ == "__main__":
    from test_training_loop import same_runs

    torch.set_num_threads(1)
    kills, folder = int(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir()
    length = 50 * kills  # more than there is time for before the last kill
    train(folder / "whole", length)  # in this process, which then has imported everything
    steps = killed_run(folder / "parts", length, kills)
    same_runs(folder / "whole", folder / "parts")
    print(
        f"{kills} kills, checkpoints at steps {steps}; {length} steps, bit-identical to the run without kills"
    )
