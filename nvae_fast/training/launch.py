"""Which of several processes this one is, from the environment variables of its launcher.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. mpirun (Open MPI, MPICH, Intel MPI) and srun
(Slurm) set variables of their own, which say everything but where process 0 can be reached; on a single node that is known.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

# (name, rank, size, local rank, processes on this node)
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    # A Slurm step: a batch script itself, which runs one process, has no SLURM_STEP_NUM_TASKS. srun may also set PMI_*.
    ("Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    ("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
PORT = "29500"  # of process 0 where no launcher names one, as torchrun's


class Launch(NamedTuple):
    """Rank and number of the processes, rank among those of this node (None: not known), and address of process 0."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    address: str = ""
    port: str = ""


def find_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """This process among those that were started together; ``Launch()`` when it was started alone.

    environment: `os.environ` by default. Raises ValueError naming the variable when one is missing or wrong.
    """
    env = os.environ if environment is None else environment
    for launcher, rank_name, size_name, local_name, local_size_name in _LAUNCHERS:
        if launcher == "torchrun" and (rank_name in env) != (size_name in env):
            given, missing = (rank_name, size_name) if rank_name in env else (size_name, rank_name)
            if env[given] not in ("0", "1"):
                raise ValueError(f"{given}={env[given]} is set and {missing} is not: set both, or neither")
        if rank_name not in env or size_name not in env:
            continue
        size = _number(env, size_name, 1)
        if size == 1:
            return Launch()
        rank = _number(env, rank_name, 0)
        if rank >= size:
            raise ValueError(f"{rank_name} must be below {size_name} ({size}), got {rank}")
        local = _number(env, local_name, 0) if local_name in env else None
        one_node = env.get(local_size_name) == str(size) or (
            launcher == "Slurm" and env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES")) == "1"
        )
        address = env.get("MASTER_ADDR") or ("127.0.0.1" if one_node else "")
        port = env.get("MASTER_PORT") or ("" if launcher == "torchrun" else PORT)
        missing = " and ".join(
            name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value
        )
        if missing:
            raise ValueError(
                f"{size_name} says that there are {size} processes, but {missing} is not set: set it to where process 0 "
                "can be reached, the same on all processes, or start them with torchrun"
            )
        return Launch(rank, size, local, address, port)
    return Launch()


def processes_here(environment: Mapping[str, str] | None = None) -> int:
    """The number of processes of the run on this machine, 1 where the launcher does not say. Raises as `find_launch`."""
    env = os.environ if environment is None else environment
    for _, rank_name, size_name, _, local_size_name in _LAUNCHERS:
        if rank_name in env and size_name in env:
            return _number(env, local_size_name, 1) if local_size_name in env else 1
    return 1


def _number(env: Mapping[str, str], name: str, least: int) -> int:
    try:
        value = int(env[name])
    except ValueError:
        value = least - 1
    if value < least:
        raise ValueError(
            f"the environment variable {name} must be a whole number >= {least}, got {env[name]!r}"
        )
    return value
