"""One helper that makes an op out of a room's parts: schema, checks, reference, fake and autograd in one call.

An op of this package is a custom operator ``torch.ops.nvae_fast.<name>``. Its default kernel is the room's reference;
the C++ extension and the Triton launchers add kernels for their device. The public function of a room calls the
returned :class:`Room`, which checks the arguments and then runs either the operator (a fused kernel exists for that
device) or the reference itself, which autograd and torch.compile then see as ordinary PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nvae_fast.ops import _backend, _devices, _extension

NAMESPACE = "nvae_fast"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


class Room:
    """A checked, dispatching op. Call it with the operator's arguments in schema order."""

    def __init__(
        self,
        name: str,
        check: Callable[..., None],
        reference: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
    ) -> None:
        self.name = name
        self.check = check
        self.reference = reference
        self.operator = getattr(getattr(torch.ops, NAMESPACE), name)
        self._kernel = self.operator.default
        room = self

        # The operator's registered autograd does the same for compilers, but costs a tenth of a millisecond a call.
        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                outputs = room._run(*args)
                setup_context(ctx, args, outputs)
                return outputs

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
                return backward(ctx, *grads)

        self._differentiable = Differentiable

    def _run(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._kernel(*args)

    def __call__(self, *args: Any) -> Any:
        self.check(*args)
        if not _backend.fused(self.name, args[0].device):
            return self.reference(*args)
        if torch.compiler.is_compiling():
            return self.operator(*args)
        if torch.is_grad_enabled():
            for value in args:
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    return self._differentiable.apply(*args)
        return self._run(*args)


def operator(
    name: str,
    schema: str,
    *,
    default: Callable[..., Any],
    fake: Callable[..., Any],
    gpu: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``nvae_fast::<name>`` without autograd (the backward kernel of a room) and return it.

    ``default`` is its formula in plain PyTorch, ``gpu`` the launcher of a Triton kernel.
    """
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    if gpu is not None and _backend.triton_reason() is None:
        LIBRARY.impl(name, _devices.by_device(gpu, default), "CUDA")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def room(
    name: str,
    schema: str,
    *,
    check: Callable[..., None],
    reference: Callable[..., Any],
    differentiable: Sequence[int],
    fake: Callable[..., Any] | None = None,
    backward: Callable[..., Sequence[torch.Tensor | None]] | None = None,
    cpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
    save_outputs: Sequence[int] | Callable[..., Sequence[int]] = (),
) -> Room:
    """Register ``nvae_fast::<name>``.

    Args:
        name: the op's one name.
        schema: arguments and returns, ``"(Tensor x, ...) -> Tensor"``. The first argument is a tensor whose device decides.
        check: raises ValueError/TypeError for bad arguments; runs before anything is computed, in the fake too.
        reference: plain PyTorch, the default kernel, and what the fused kernels are tested against.
        differentiable: positions of the arguments that receive gradients.
        fake: shapes of the outputs; by default the reference run on fake tensors.
        backward: ``backward(grads, wanted, *args) -> gradients of the differentiable arguments``, of which those at the
            positions ``wanted`` are used; by default the reference is recomputed and differentiated.
        cpu: composition of C++ operators, registered for the CPU when the extension is loaded.
        gpu: launcher of the Triton kernel, registered for CUDA when triton is installed.
        save_outputs: positions of outputs that ``backward`` is given after ``*args``, or a function of ``*args`` that says
            which.
    """
    qualified = f"{NAMESPACE}::{name}"
    LIBRARY.define(name + schema)

    def default_kernel(*args: Any) -> Any:
        outputs = reference(*args)
        return tuple(outputs) if isinstance(outputs, tuple) else outputs

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return (fake or default_kernel)(*args)

    LIBRARY.impl(name, default_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, checked_fake, lib=LIBRARY)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        outputs = _as_tuple(output)
        kept = save_outputs(*inputs) if callable(save_outputs) else save_outputs
        ctx.save_for_backward(*tensors, *(outputs[i] for i in kept))
        ctx.constants = [None if isinstance(value, torch.Tensor) else value for value in inputs]

    def run_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{name}: double backward is not supported; use nvae_fast.use_backend('reference') for create_graph=True"
            )
        saved = iter(ctx.saved_tensors)
        args = [
            next(saved) if tensor else constant
            for tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
        ]
        result: list[torch.Tensor | None] = [None] * len(args)
        wanted = [i for i in differentiable if ctx.needs_input_grad[i]]
        if wanted and any(grad is not None for grad in grads):
            gradients: Sequence[torch.Tensor | None]
            if backward is None:
                gradients = recompute(grads, *args)
            elif torch.compiler.is_compiling():
                gradients = backward(grads, wanted, *args, *saved)
            else:  # nothing is recorded here; the detour through autograd's fallback doubles the cost of a call
                with torch._C._AutoDispatchBelowAutograd():
                    gradients = backward(grads, wanted, *args, *saved)
            for i, gradient in zip(differentiable, gradients, strict=True):
                result[i] = gradient if i in wanted else None
        return tuple(result)

    def recompute(grads: Sequence[torch.Tensor | None], *args: Any) -> list[torch.Tensor | None]:
        values = list(args)
        with torch.enable_grad():
            for i in differentiable:
                if isinstance(values[i], torch.Tensor):
                    values[i] = values[i].detach().requires_grad_(True)
            outputs = _as_tuple(reference(*values))
        leaves = [values[i] for i in differentiable if isinstance(values[i], torch.Tensor)]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
            if pairs
            else [None] * len(leaves)
        )
        return [next(found) if isinstance(values[i], torch.Tensor) else None for i in differentiable]

    torch.library.register_autograd(qualified, run_backward, setup_context=setup_context, lib=LIBRARY)

    if cpu is not None and _extension.load():
        LIBRARY.impl(name, cpu, "CPU")
    record_kernels(name, gpu, default_kernel)
    return Room(name, check, reference, setup_context, run_backward)


def record_kernels(name: str, gpu: Callable[..., Any] | None, formula: Callable[..., Any]) -> None:
    """Register ``gpu`` (the launcher of a Triton kernel; ``formula`` runs on GPUs that Triton does not support) and note which
    kernels ``nvae_fast::<name>`` has on each device."""
    qualified = f"{NAMESPACE}::{name}"
    for key, kernel in (("CPU", "cpp"), ("CUDA", "cuda")):
        device = key.lower()
        if _extension.load() and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
            _backend.record(name, device, kernel)
        elif gpu is not None and key == "CUDA" and _backend.triton_reason() is None:
            LIBRARY.impl(name, _devices.by_device(gpu, formula), "CUDA")
            _backend.record(name, device, "triton")
        elif gpu is not None and key == "CUDA":
            _backend.record(name, device, None, _backend.triton_reason() or "")
        else:
            without = _extension.NO_CUDA if key == "CUDA" and not _extension.has_cuda() else ""
            own = "PyTorch's own kernels are used for this op"
            _backend.record(name, device, None, _extension.reason() or without or own)
