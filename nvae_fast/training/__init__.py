"""Training and evaluation: objective, schedules, a training step that undoes itself, a training loop that resumes.

    from nvae_fast.training import balanced_kl, kl_coefficient, TrainingConfig, Trainer, evaluate

`objective` and `schedule` hold pure functions for use in other training loops. `Step` is one optimizer step and `Sampler`
draws images; each is one CUDA graph on a GPU. `Trainer` does what `python -m nvae_fast train` does.
"""

from nvae_fast.training.checkpoint import CheckpointError, load_model
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.distributed import ProcessLost, World, start_world
from nvae_fast.training.evaluation import Evaluation, evaluate, importance_bound
from nvae_fast.training.loop import RunResult, Trainer, TrainingDiverged
from nvae_fast.training.objective import annealed_lambda, balanced_kl, kl_balance, kl_coefficient
from nvae_fast.training.presets import PRESETS, TrainingPreset, preset
from nvae_fast.training.run_folder import RunFolderError
from nvae_fast.training.sampler import Sampler
from nvae_fast.training.schedule import learning_rate
from nvae_fast.training.step import Step, StepResult

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Evaluation",
    "ProcessLost",
    "RunFolderError",
    "RunResult",
    "Sampler",
    "Step",
    "StepResult",
    "Trainer",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingPreset",
    "World",
    "annealed_lambda",
    "balanced_kl",
    "evaluate",
    "importance_bound",
    "kl_balance",
    "kl_coefficient",
    "learning_rate",
    "load_model",
    "preset",
    "start_world",
]
