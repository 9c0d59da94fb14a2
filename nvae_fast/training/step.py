"""One training step: forward, loss, backward and Adamax, all of it undone when the loss or a gradient is not finite.

On one GPU the whole step is a single CUDA graph: its body is a function of device tensors alone (images, and the
coefficients, learning rate and seed in `DeviceScalars`), never waits for the device and never decides anything on the host.
Everywhere else the same body runs eagerly. The host reads one vector of numbers per step and decides whether the step is kept:
in eager mode before the optimizer runs, after a graph by restoring parameters, optimizer and buffers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nvae_fast.models.seeds import is_per_image
from nvae_fast.ops.philox import split_seed
from nvae_fast.training import precision
from nvae_fast.training.adamax import Adamax
from nvae_fast.training.averages import WeightAverages
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.distributed import World
from nvae_fast.training.graph import CapturedFunction, CudaRecorder, DeviceScalars, Recorder, layout
from nvae_fast.training.loss import Objective

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

# Adamax divides by a running maximum of |gradient|; 1e-3 keeps rarely used weights from taking huge steps.
ADAMAX_EPS = 1e-3


@dataclass(frozen=True)
class StepResult:
    """The numbers of one step. loss: the minimised value; reconstruction, kl: means over the batch in nats per image; spectral,
    batch_norm: the unweighted regularisers; grad_norm: norm of all gradients before clipping; skipped: the step was undone;
    kl_per_channel: means over the batch of the KL of every latent channel, in order of the groups, coarsest scale first;
    large: it was undone because its finite grad_norm exceeds `skip_grad_norm`; rescaled: it was undone because a gradient
    overflowed in float16, and the scale of the loss has been lowered."""

    loss: float
    reconstruction: float
    kl: float
    spectral: float
    batch_norm: float
    grad_norm: float
    skipped: bool
    kl_per_channel: tuple[float, ...] = ()
    large: bool = False
    rescaled: bool = False


class Step:
    """A training step of a model with its optimizer, which undoes steps that are not finite.

    It also undoes those whose gradient norm exceeds `config.skip_grad_norm`.

    model: the NVAE, already on its device and in its memory format. After a step whose loss or gradient was
    not finite (on any process), parameters, optimizer, batch-norm statistics and spectral vectors are what
    they were before it. config: a `TrainingConfig`. world: the processes of the run, None for a single one. Raises
    ValueError where `config` requests what is not possible.

    `config.cuda_graph` None captures the step in a CUDA graph where that is possible, and `mode` says whether it
    is; True raises ValueError where it is not. The first steps run eagerly (they initialise, choose algorithms
    and allocate the optimizer's state), and so do the first ones after a change of the batch shape. A capture keeps
    copies of parameters and optimizer state, three times the parameters' memory, to undo a bad step with.
    recorder: replaces the CUDA graph capture in tests.

    Processes may have different numbers of images, even none: gradients and the numbers returned are those of all images.
    With `config.accumulate` every process computes its images in that many parts, one after another, and adds their gradients.
    With `config.autocast` "fp16" the loss is scaled (`scaling`) and the step is not captured. With `config.ema`, `averages` are
    the averages of the weights, updated after every step that is not undone.
    """

    def __init__(
        self,
        model: NVAE,
        config: TrainingConfig,
        world: World | None = None,
        *,
        recorder: Recorder | None = None,
    ) -> None:
        self.world = world or World()
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.config = config = precision.resolved(config, self.device)
        scaled = config.autocast == "fp16"
        reason = _no_graph(self.device, self.world, config) if recorder is None or scaled else ""
        if reason and config.cuda_graph:
            raise ValueError(f"Step: cuda_graph asked for, but {reason}")
        self.mode = f"eager: {reason}" if reason else "one CUDA graph"
        self._replay: CapturedFunction | None = None
        if not reason:
            self._replay = CapturedFunction(recorder or CudaRecorder(self.device))
        if config.checkpoint_cells:
            model.checkpoint_cells = True
        self.optimizer = make_optimizer(self.parameters, config, capturable=self._replay is not None)
        self._controls = DeviceScalars(("coefficient", "weight", "learning_rate"), self.device)
        self._rate = torch.zeros((), device=self.device)  # what a capturable optimizer reads
        objective: nn.Module = Objective(model, config, self.world)
        if self.world.size > 1:
            objective = _data_parallel(objective, self.world, unused=model.config.is_vanilla)
        self.objective = objective
        self._buffers = [b for b in model.buffers() if b is not None]
        self._saved = [torch.empty_like(b) for b in self._buffers]
        # Parameters and optimizer state with their copies, once a capture updates them before the host decides.
        self._moved: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._images: Tensor | None = None
        self._layout: Hashable = None  # of the batches that `_images` was made for
        # Data-dependent initialisation sets parameters in the first forward, so until one step went well they
        # are remembered too, with the flags that say what is still to be initialised.
        self._first: _Beginning | None = _Beginning(model)
        self._image_seeds: Tensor | None = None
        self.scaling = precision.LossScaling(self.device) if scaled else None
        self.averages = None if config.ema is None else WeightAverages(model, config.ema)

    def __call__(
        self, x: Tensor, *, seed: Tensor | int, coefficient: float, weight: float, learning_rate: float
    ) -> StepResult:
        """Take one step on images x (B,C,H,W) in [0,1]; weight is lambda, coefficient the KL coefficient.

        seed: of the noise; an int64 tensor (B,) gives one seed per image. Raises ValueError for those in a CUDA graph.
        """
        self._image_seeds = seed if is_per_image(seed) else None
        if self._image_seeds is not None and self._replay is not None:
            raise ValueError(
                "Step: one seed per image needs cuda_graph=False, a capture holds one seed per step"
            )
        plain = 0 if is_per_image(seed) else seed
        self._controls.write(plain, coefficient=coefficient, weight=weight, learning_rate=learning_rate)
        result = self._take(x, learning_rate)
        if self.averages is not None and not result.skipped:
            self.averages.update()
        return result

    def _take(self, x: Tensor, learning_rate: float) -> StepResult:
        """Take the step, eagerly or from the capture."""
        if self._replay is None:
            return self._eager(x, learning_rate, lambda body: body())
        # A capture allocates nothing that outlives it, so that the optimizer's state must exist before.
        begun = self._first is None and len(self.optimizer.state) > 0
        if not self._replay.ready(layout(x)) or not begun:
            return self._eager(x, self._rate, self._replay.warm_up)
        return self._captured(x, self._replay)

    def restore(self, optimizer_state: dict[str, Any]) -> None:
        """Continue from `optimizer_state` as :meth:`optimizer_state` gave it; the model's own state was loaded before."""
        capturable = self._replay is not None
        groups = [
            {**group, "lr": float(group.get("lr", self.config.learning_rate)), "capturable": capturable}
            for group in optimizer_state["param_groups"]
        ]
        self.optimizer.load_state_dict({**optimizer_state, "param_groups": groups})
        self._first = _Beginning(self.model) if layers_needing_data_init(self.model) else None
        self._moved, self._copies = [], []
        if self._replay is not None:
            self._replay.reset()

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, which can be restored on any device and in any mode."""
        state = self.optimizer.state_dict()
        groups = [{**group, "lr": float(group["lr"]), "capturable": False} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds of the averages of the weights ("ema") and the scale of the loss ("scaler"), if there are."""
        state = {}
        if self.averages is not None:
            state["ema"] = self.averages.state()
        if self.scaling is not None:
            state["scaler"] = self.scaling.state()
        return state

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Continue from the checkpoint `state`, whose model has been loaded. What its run did not have begins anew.

        Raises ValueError where it lacks what its run had.
        """
        before = state["training_config"]
        if self.averages is not None:
            if "ema" in state:
                self.averages.restore(state["ema"])
            elif before.get("ema") is None:
                self.averages.start()
            else:
                raise ValueError("it lacks ema, the averages of the weights that its options ask for")
        if self.scaling is not None:
            if "scaler" in state:
                self.scaling.restore(state["scaler"])
            elif before.get("autocast") == "fp16":
                raise ValueError("it lacks scaler, the scale of the loss that its options ask for")

    def _eager(
        self, x: Tensor, rate: float | Tensor, run: Callable[[Callable[[], Tensor]], Tensor]
    ) -> StepResult:
        """Run forward and backward, and the optimizer if all is finite. run: calls each of the two."""
        values = run(lambda: self.gradients(x))
        result = self._decide(values)
        if result.skipped:
            self._undo()
            if self.scaling is not None:
                rescaled = self.scaling.undone(loss_is_finite=math.isfinite(result.loss))
                result = dataclasses.replace(result, rescaled=rescaled)
        else:
            run_update = self._replay.recorder.warm_up if self._replay is not None else lambda body: body()
            run_update(lambda: self.update(rate))
            self._first = None
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _captured(self, x: Tensor, replay: CapturedFunction) -> StepResult:
        """Run the captured step, and undo it unless all is finite."""
        if self._images is None or self._layout != layout(x):
            self._images, self._layout = torch.empty_like(x), layout(x)
        if not self._moved:
            state = [
                value
                for parameter in self.parameters
                for value in self.optimizer.state.get(parameter, {}).values()
            ]
            self._moved = [*(p.detach() for p in self.parameters), *state]
            self._copies = [torch.empty_like(value) for value in self._moved]
        images = self._images
        images.copy_(x, non_blocking=True)
        values = replay.run(lambda: self.body(images))
        # A replay writes behind autograd's back; caches of what follows from the weights look at their versions.
        torch.autograd.graph.increment_version([*self.parameters, *self._buffers])
        result = self._decide(values)
        if result.skipped:
            self._undo()
            _copy(self._moved, self._copies)
        return result

    def body(self, x: Tensor) -> Tensor:
        """The captured function: copies to undo the step with, then the step on images x. Returns the result of `gradients`."""
        _copy(self._copies, self._moved)
        values = self.gradients(x)
        self.update(self._rate)
        self.optimizer.zero_grad(set_to_none=True)
        return values

    def gradients(self, x: Tensor) -> Tensor:
        """Forward and backward of images x into `.grad`, clipped: [all finite, the loss's numbers, the gradient's norm]."""
        _copy(self._saved, self._buffers)
        parts = self._backward(x)
        if self.scaling is not None:
            self.scaling.unscale(self.optimizer)
        norm = self._clip()
        # One synchronisation per step: all numbers that the host needs are copied together.
        values = torch.cat([parts, norm.to(parts).reshape(1)])
        return torch.cat([torch.isfinite(values).all().to(values).reshape(1), values])

    def _backward(self, x: Tensor) -> Tensor:
        """Set the gradients of the whole batch; return the numbers of the loss, to be averaged over the processes."""
        several = self.world.size > 1
        count: float | Tensor = x.shape[0]
        if several:
            count = self.world.sum(torch.full((), x.shape[0], dtype=torch.float64, device=x.device))
            count = (count / self.world.size).to(torch.promote_types(x.dtype, torch.float32))
        pieces = self._pieces(x)
        total: Tensor | None = None
        for index, (images, seed) in enumerate(pieces):
            last = index == len(pieces) - 1
            numbers = self._controls.numbers
            # Gradients travel between processes once, with the last part.
            wait = contextlib.nullcontext() if last or not several else self.objective.no_sync()  # type: ignore[operator]
            with wait:
                loss, parts = self.objective(
                    images, seed, numbers["coefficient"], numbers["weight"], count, last
                )
                if self.scaling is not None:
                    loss = self.scaling.scaled(loss)
                if several:
                    loss.backward()  # the reduction over processes hangs on it
                else:
                    self._add_gradients(loss, first=index == 0)
            total = parts if total is None else total + parts
        assert total is not None
        return total

    def _pieces(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The parts of a batch with their seeds. Every process has the same number of parts, some of which may be empty."""
        seed = self._controls.seed if self._image_seeds is None else self._image_seeds
        count = self.config.accumulate
        if self.world.size == 1:
            count = max(min(count, x.shape[0]), 1)
        if count == 1:
            return [(x, seed)]
        seeds = split_seed(seed, count).unbind() if self._image_seeds is None else seed.tensor_split(count)
        return list(zip(x.tensor_split(count), seeds, strict=True))

    def _add_gradients(self, loss: Tensor, *, first: bool) -> None:
        # The gradients of the first part are assigned, which saves two calls per parameter.
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if first:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            return
        both = [
            (p.grad, g)
            for p, g in zip(self.parameters, gradients, strict=True)
            if g is not None and p.grad is not None
        ]
        torch._foreach_add_([old for old, _ in both], [new for _, new in both])
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient

    @torch.no_grad()
    def update(self, rate: float | Tensor) -> None:
        """The optimizer's step at a learning rate: a number, or the 0-d tensor that follows the controls."""
        if isinstance(rate, Tensor):
            rate.copy_(self._controls.numbers["learning_rate"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaling is not None:
            self.scaling.step(self.optimizer)
        else:
            self.optimizer.step()

    def _decide(self, values: Tensor) -> StepResult:
        # One exchange: whether all is finite on every process, and the numbers of the whole batch.
        if self.world.size > 1:
            values = self.world.mean(values.double())
        finite, loss, reconstruction, kl, spectral, batch_norm, *channels, norm = values.tolist()
        most = self.config.skip_grad_norm
        large = finite == 1.0 and most is not None and norm > most
        return StepResult(
            loss,
            reconstruction,
            kl,
            spectral,
            batch_norm,
            norm,
            finite != 1.0 or large,
            kl_per_channel=tuple(channels),
            large=large,
        )

    def _clip(self) -> Tensor:
        """The gradient's norm over all parameters; scales the gradient when clipping is on."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm, foreach=True)
        return norm

    @torch.no_grad()
    def _undo(self) -> None:
        _copy(self._buffers, self._saved)
        if self._first is not None:
            self._first.bring_back()


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:  # a model without buffers has nothing to copy
        torch._foreach_copy_(targets, sources)


def _no_graph(device: torch.device, world: World, config: TrainingConfig) -> str:
    """Why the step cannot be captured, or must not; empty when it will be."""
    if config.cuda_graph is False:
        return "cuda_graph is off"
    if config.autocast == "fp16":
        return "fp16 has a gradient scaler, which PyTorch adapts between steps, outside of a CUDA graph"
    if device.type != "cuda":
        return f"a CUDA graph needs a GPU, the model is on {device.type}"
    if world.size > 1:
        # Gradient buckets, collectives and the other processes' verdict on a bad step would all be captured.
        return f"a CUDA graph holds the step of one process, this run has {world.size}"
    return ""


def _data_parallel(objective: nn.Module, world: World, *, unused: bool) -> nn.Module:
    """`objective` with gradients averaged over processes. unused: some parameters get no gradient."""
    # Strides of 1x1 weights have two spellings, and the name of the option below is changing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated")
        # Batch norm merges its statistics itself and the spectral vectors are updated identically on every process:
        # buffers need no broadcast.
        return nn.parallel.DistributedDataParallel(
            objective,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=unused,
        )


class _Beginning:
    """A copy of parameters and module flags from before the first step."""

    def __init__(self, model: NVAE) -> None:
        self.model = model
        self.parameters = [p.detach().clone() for p in model.parameters()]
        self.awaiting = layers_needing_data_init(model)
        self.warm = model.spectral.warm

    def bring_back(self) -> None:
        for parameter, saved in zip(self.model.parameters(), self.parameters, strict=True):
            parameter.copy_(saved)
        self.model.spectral.warm = self.warm
        mark_needing_data_init(self.model, self.awaiting)


def layers_needing_data_init(model: NVAE) -> list[str]:
    """Names of the modules whose data-dependent initialisation has not happened yet."""
    return [name for name, module in model.named_modules() if getattr(module, "needs_data_init", False)]


def mark_needing_data_init(model: NVAE, names: list[str]) -> None:
    """Mark these modules for initialisation by the next batch. (Loading a state marks all modules as initialised.)"""
    for name in names:
        setattr(model.get_submodule(name), "needs_data_init", True)  # noqa: B010  no attribute of nn.Module


def make_optimizer(
    parameters: list[nn.Parameter], config: TrainingConfig, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """Adamax as NVAE uses it: eps 1e-3, default betas, L2 weight decay, in a few large operations.

    capturable: the count of steps stays on the device and the learning rate may be a tensor there.
    """
    return Adamax(
        parameters,
        lr=config.learning_rate,
        eps=ADAMAX_EPS,
        weight_decay=config.weight_decay,
        foreach=True,
        capturable=capturable,
    )
