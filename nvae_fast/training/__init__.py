"""Training and evaluation: objective, schedules, a training step that undoes itself, a training loop that resumes.

    from nvae_fast.training import balanced_kl, kl_coefficient, TrainingConfig, Trainer, evaluate

`objective` and `schedule` hold pure functions for use in other training loops. `Step` is one optimizer step and `Sampler`
draws images; each is one CUDA graph on a GPU. `Trainer` does what `python -m nvae_fast train` does.
"""

from nvae_fast.training.checkpoint import CheckpointError, load_model
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.distributed import ProcessLost, World, start_world
from nvae_fast.training.evaluation import Evaluation, evaluate, importance_bound
from nvae_fast.training.fid import (
    FeatureStatistics,
    dataset_statistics,
    frechet_distance,
    kernel_distance,
    load_inception,
    model_statistics,
)
from nvae_fast.training.image_files import SampledFolder, sample_to_folder
from nvae_fast.training.loop import RunResult, Trainer, TrainingDiverged
from nvae_fast.training.objective import annealed_lambda, balanced_kl, kl_balance, kl_coefficient
from nvae_fast.training.plot import plot_runs
from nvae_fast.training.presets import PRESETS, TrainingPreset, preset
from nvae_fast.training.run_folder import RunFolderError
from nvae_fast.training.sampler import Sampler
from nvae_fast.training.schedule import learning_rate
from nvae_fast.training.starting_point import StartingPoint, init_from
from nvae_fast.training.step import Step, StepResult

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Evaluation",
    "FeatureStatistics",
    "ProcessLost",
    "RunFolderError",
    "RunResult",
    "SampledFolder",
    "Sampler",
    "StartingPoint",
    "Step",
    "StepResult",
    "Trainer",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingPreset",
    "World",
    "annealed_lambda",
    "balanced_kl",
    "dataset_statistics",
    "evaluate",
    "frechet_distance",
    "importance_bound",
    "init_from",
    "kernel_distance",
    "kl_balance",
    "kl_coefficient",
    "learning_rate",
    "load_inception",
    "load_model",
    "model_statistics",
    "plot_runs",
    "preset",
    "sample_to_folder",
    "start_world",
]
