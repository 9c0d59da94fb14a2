"""One training step: forward, loss, backward, Adamax; undone as a whole when anything in it is not finite."""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nvae_fast._prepared import prepare_weights
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.distributed import World
from nvae_fast.training.objective import balanced_kl, full_precision

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

# Adamax divides by a running maximum of |gradient|; 1e-3 keeps rarely used weights from taking huge steps.
ADAMAX_EPS = 1e-3


@dataclass(frozen=True)
class StepResult:
    """The numbers of one step, in nats a image where they are likelihoods; `skipped` when it was undone."""

    loss: float
    reconstruction: float
    kl: float
    spectral: float
    batch_norm: float
    grad_norm: float
    skipped: bool


class Objective(nn.Module):
    """The whole loss as one module, so that DistributedDataParallel sees every use of a parameter."""

    def __init__(self, model: NVAE, config: TrainingConfig, world: World) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.world = world

    def forward(
        self, x: Tensor, seed: Tensor | int, coefficient: float | Tensor, weight: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loss, [loss, reconstruction, kl, spectral, batch_norm]); the first carries the gradient."""
        with prepare_weights(self.model):
            return self._forward(x, seed, coefficient, weight)

    def _forward(
        self, x: Tensor, seed: Tensor | int, coefficient: float | Tensor, weight: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        enabled = self.config.autocast == "bf16"
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=enabled):
            out = self.model(x, seed=seed)
        # Likelihood and KL in full precision: they are sums over thousands of terms.
        reconstruction = self.model.reconstruction_loss(full_precision(out.logits), x)
        kl = full_precision(out.kl)
        if self.config.kl_balance:
            average = self.world.mean if self.world.size > 1 else None
            weighted = balanced_kl(kl, coefficient, self.model.config, average=average)
        else:
            weighted = coefficient * kl.sum(1)
        spectral, batch_norm = self.model.regularization()
        loss = (reconstruction + weighted).mean() + weight * (spectral + batch_norm)
        numbers = torch.stack(
            [loss, reconstruction.mean(), kl.sum(1).mean(), spectral.to(loss), batch_norm.to(loss)]
        )
        return loss, numbers.detach()


class Step:
    """Holds the model, its optimizer and what is needed to undo a bad step.

    model: the NVAE, already on its device and in its memory format. After a step whose loss or gradient was
    not finite (on any process), parameters, optimizer, batch-norm statistics and spectral vectors are what
    they were before it.
    """

    def __init__(self, model: NVAE, config: TrainingConfig, world: World | None = None) -> None:
        self.world = world or World()
        self.model = model
        self.config = config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config)
        objective: nn.Module = Objective(model, config, self.world)
        if self.world.size > 1:
            objective = _data_parallel(objective, self.world, unused=model.config.is_vanilla)
        self.objective = objective
        self._buffers = [b for b in model.buffers() if b is not None]
        self._saved = [torch.empty_like(b) for b in self._buffers]
        # Data-dependent initialisation sets parameters in the first forward, so until one step went well they
        # are remembered too, with the flags that say what is still to be initialised.
        self._first: _Beginning | None = _Beginning(model)

    def __call__(
        self, x: Tensor, *, seed: Tensor | int, coefficient: float, weight: float, learning_rate: float
    ) -> StepResult:
        """Take one step on images x (B,C,H,W) in [0,1]; weight is lambda, coefficient the KL coefficient."""
        self._remember()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss, numbers = self.objective(x, seed, coefficient, weight)
        loss.backward()
        norm = self._clip()
        # One wait for the device a step: everything the host wants to know travels together.
        values = torch.cat([numbers, norm.to(numbers).reshape(1)])
        finite, *host = torch.cat([torch.isfinite(values).all().to(values).reshape(1), values]).tolist()
        (bad,) = self.world.largest(0.0 if finite else 1.0)
        if bad:
            self._undo()
        else:
            self.optimizer.step()
            self._first = None
        self.optimizer.zero_grad(set_to_none=True)
        loss_value, reconstruction, kl, spectral, batch_norm, grad_norm = host
        return StepResult(loss_value, reconstruction, kl, spectral, batch_norm, grad_norm, skipped=bool(bad))

    def restore(self, optimizer_state: dict[str, Any]) -> None:
        """Continue from a saved optimizer state; the model's own state was loaded before."""
        self.optimizer.load_state_dict(optimizer_state)
        self._first = _Beginning(self.model) if awaiting_data(self.model) else None

    def _clip(self) -> Tensor:
        """The gradient's norm over all parameters; scales the gradient when clipping is on."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm, foreach=True)
        return norm

    @torch.no_grad()
    def _remember(self) -> None:
        with contextlib.suppress(IndexError):  # a model without buffers has nothing to copy
            torch._foreach_copy_(self._saved, self._buffers)

    @torch.no_grad()
    def _undo(self) -> None:
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(saved)
        if self._first is not None:
            self._first.bring_back()


def _data_parallel(objective: nn.Module, world: World, *, unused: bool) -> nn.Module:
    """`objective` with gradients averaged over processes. unused: some parameters get no gradient."""
    # Strides of 1x1 weights have two spellings, and the name of the option below is changing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated")
        # Batch norm merges its statistics itself and the spectral vectors move alike on every process:
        # buffers need no broadcast.
        return nn.parallel.DistributedDataParallel(
            objective,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=unused,
        )


class _Beginning:
    """Parameters and module flags before the first step."""

    def __init__(self, model: NVAE) -> None:
        self.model = model
        self.parameters = [p.detach().clone() for p in model.parameters()]
        self.awaiting = awaiting_data(model)
        self.extra = [(m, copy.deepcopy(m.get_extra_state())) for m in model.modules() if _has_extra_state(m)]

    def bring_back(self) -> None:
        for parameter, saved in zip(self.model.parameters(), self.parameters, strict=True):
            parameter.copy_(saved)
        for module, state in self.extra:
            module.set_extra_state(copy.deepcopy(state))
        await_data(self.model, self.awaiting)


def awaiting_data(model: NVAE) -> list[str]:
    """Names of the modules whose data-dependent initialisation is still to come."""
    return [name for name, module in model.named_modules() if getattr(module, "awaits_data", False)]


def await_data(model: NVAE, names: list[str]) -> None:
    """Let these modules be initialised by the next batch. (Loading a state marks all of them as done.)"""
    for name in names:
        setattr(model.get_submodule(name), "awaits_data", True)  # noqa: B010  no attribute of nn.Module


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def make_optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Adamax as NVAE uses it: eps 1e-3, default betas, L2 weight decay, in a few large operations."""
    return torch.optim.Adamax(
        parameters, lr=config.learning_rate, eps=ADAMAX_EPS, weight_decay=config.weight_decay, foreach=True
    )
