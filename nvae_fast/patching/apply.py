"""The public functions: ``accelerate``, ``acceleration_report`` and ``restore``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from nvae_fast.models.frozen import FREEZERS, refuse
from nvae_fast.patching import cells
from nvae_fast.patching.bound import PARTS, BoundForward, bound_forward, remove
from nvae_fast.patching.freezing import freeze_part, freezes
from nvae_fast.patching.progress import Progress, one_thread
from nvae_fast.patching.recognise import Comparisons
from nvae_fast.patching.sample import measure_with

FREEZERS.append(freeze_part)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class AccelerationReport:
    """Result of :func:`acceleration_report`.

    ``replaced``: (name, kind) of each part that runs our kernels; ``left``: (name, reason) of each that looks like such a part
    and does not; ``notes``: (name, remark) of some that are replaced. Names are those of ``named_modules()``; modules of other
    kinds are not listed. ``str()`` makes a table.
    """

    replaced: list[tuple[str, str]]
    left: list[tuple[str, str]]
    notes: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        notes = dict(self.notes)
        rows = [("replaced", name, kind, notes.get(name, "")) for name, kind in self.replaced]
        rows += [("left", name, reason, "") for name, reason in self.left]
        width = max((len(name) for _, name, *_ in rows), default=0)
        lines = [f"{len(self.replaced)} parts replaced, {len(self.left)} left"]
        if not rows:
            lines[0] += (
                ": nf.accelerate was not called, or recognises no part of this model (its documentation lists the parts)"
            )
        for what, name, text, note in rows:
            shown = f"{text} ({note})" if note else text
            lines.append(f"  {what:8}  {name or '(model)':{max(width, 7)}}  {shown}")
        return "\n".join(lines)


def accelerate(
    model: Model, *, repair: bool = False, sample_input: Any = None, progress: bool | None = None
) -> Model:
    """Replace the forward of each recognised part of an NVAE-type model by one with this package's kernels.

    Recognised, by class name and attributes: batch norm with swish (``SyncBatchNormSwish`` and its like, statistics merged
    over the process group where the name says Sync; timm's ``BatchNormAct2d`` with SiLU or without activation;
    ``BatchNorm2d`` or ``SyncBatchNorm`` and SiLU inside a Sequential), squeeze-and-excitation (two Linear or 1x1 convolutions
    with or without bias; ReLU or SiLU, Sigmoid or Hardsigmoid, as modules or functions), depthwise ``Conv2d``, convolutions
    with ``log_weight_norm`` (masked ones too; on the CPU, taps that the mask leaves in no channel are not computed), and
    residual cells ``skip(x) + 0.1 * [se](ops(x))``. A cell, by whatever class name, whose layers are BN, 1x1, BN + swish,
    depthwise, BN + swish, 1x1, BN, with or without nearest upsampling before the depthwise convolution, runs in one call
    (:mod:`nvae_fast.ops.inverted_residual.train`). A block of an
    EfficientNet or MobileNet (MBConv: 1x1, depthwise, gate, 1x1, each convolution with batch norm and ReLU, ReLU6, SiLU or
    hard swish) runs in one call in evaluation on a CPU (:mod:`nvae_fast.patching.mbconv`); in training its parts are replaced.

    Each part is first compared with its own forward on copies, in evaluation and training mode, on one thread, in float32
    (whole cells: in float64 on the CPU): output, gradients, buffers, attributes. Equal parts are compared once. Where they
    differ a part is left; :func:`acceleration_report` says why. Parameters, buffers, state_dict keys, the types of modules,
    train/eval behaviour, arguments and hooks stay: only ``forward`` of the instances is set.

    A kernel runs where it is known to be faster than the part's own forward: by a table of measurements (the docstring of
    ``benchmarks/parts.py`` says how it is made) for the device, the dtype, the memory format, the size, and whether a backward
    pass may follow; or, with ``sample_input``, by measuring each part of ``model`` now. It also runs where nothing is known: on
    devices and in dtypes without measurements, under torch.compile, and, for parts that take batch statistics, while several
    processes train. Without ``sample_input`` a part is left if its kernel is hardly ever faster in the dtype of its
    parameters, unless :func:`freeze` makes something of it.

    A part uses its own forward for inputs that are not (B, C, H, W) or empty, where an argument beside the input is not its
    default, and while a submodule that the kernel would not call has hooks; a whole cell uses its parts then, and while its
    batch norms are not all in one mode. Programs of torch.export and torch.jit.trace hold the own forwards; torch.jit.script
    needs :func:`restore` first. A second call changes nothing. deepcopy and pickle keep it, bound to the copy; ``copy.copy``
    of a module does not (its forward is still that of the first): use deepcopy. :func:`freeze` makes an inference-only copy.
    Parts that FSDP2's ``fully_shard`` has sharded are left: call accelerate first.

    With torch.distributed in use, synchronised batch norms are compared in evaluation mode only, so that nothing is
    communicated here; hooks inside a cell must then be the same on every process, since a cell communicates differently in
    one call than part by part. Double backward needs ``use_backend("reference")``.

    Args:
        model: any module; other parts are never changed.
        repair: also replace a batch norm with swish whose own forward raises (as a synchronised one written for an older
            PyTorch may); it is compared with ``silu(batch_norm(x))`` instead.
        sample_input: the input of ``model`` (a tuple: its arguments; a mapping: its keyword arguments), of a typical size.
            Each part is measured with the input that it is given then, in evaluation and training mode, under the autocast and
            with the threads in force; the model runs once, on a copy, in evaluation mode.
        progress: show a line on stderr while parts are compared or measured; None: where stderr is a terminal.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    _check("accelerate", model)
    replace(model, repair=repair, progress=progress, everywhere=sample_input is not None)
    if sample_input is not None:
        measure_with(model, sample_input, progress)
    return model


def replace(
    model: Model, *, repair: bool = False, progress: bool | None = None, everywhere: bool = False
) -> Model:
    """:func:`accelerate` without measuring. ``everywhere``: also parts whose kernel was never measured to be faster."""
    comparisons = Comparisons()
    parts = list(_children_first(model, set()))
    with one_thread(), Progress("accelerate: comparing parts", len(parts), progress) as line:
        for part in parts:
            line.advance()
            if bound_forward(part) is None:
                verdict = comparisons.inspect(part, repair)
                if isinstance(verdict, BoundForward) and (everywhere or _slower(verdict) is None):
                    verdict.install()
    return model


def _slower(bound: BoundForward) -> str | None:
    """Return why ``bound`` would never run: its kernel is hardly ever faster, and there is nothing to freeze."""
    bound.find_rests()
    if not bound.rests.issuperset((False, True)) or freezes(bound.kind):
        return None
    part, _ = bound.part or PARTS[bound.kind](bound.module, bound.settings)
    return f"{bound.kind}: PyTorch's own was measured to be faster for {part}; accelerate(model, sample_input=x) measures here"


def _children_first(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    """Every module once, after the modules inside it (with shared modules, not the order of named_modules)."""
    seen.add(id(module))
    for child in module._modules.values():
        if child is not None and id(child) not in seen:
            yield from _children_first(child, seen)
    yield module


def acceleration_report(model: nn.Module) -> AccelerationReport:
    """Report what :func:`accelerate` replaced in ``model``, and what it left and why. Parts left are compared again.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    _check("acceleration_report", model)
    report = AccelerationReport([], [])
    comparisons = Comparisons()
    within: dict[int, str] = {}  # module inside a whole cell -> name of the cell
    for name, part in model.named_modules():
        bound = bound_forward(part)
        if bound is not None:
            report.replaced.append((name, bound.kind))
            note = bound.note
            if bound.kind == cells.WHOLE_CELL:
                obstacle = cells.obstacle(part, bound.settings["plan"])
                note = "" if obstacle is None else f"for now part by part: {obstacle}"
                if obstacle is None:
                    within |= {id(inner): name for inner in cells.inside(part, bound.settings["plan"].layout)}
            slow = [
                mode
                for mode, training in (("evaluation", False), ("training", True))
                if training in bound.rests
            ]
            if id(part) in within and bound.kind != cells.WHOLE_CELL:
                note = f"within {within[id(part)] or '(model)'}"
            elif slow:
                note = f"{note}; " if note else ""
                note += f"its own forward in {' and '.join(slow)}, which was measured to be faster"
            if note:
                report.notes.append((name, note))
        elif id(part) not in within:
            verdict = comparisons.inspect(part)
            if verdict is not None:
                if isinstance(verdict, BoundForward):
                    verdict = _slower(verdict) or f"{verdict.kind}: accelerate has not been called"
                report.left.append((name, verdict))
    return report


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`: give every part of ``model`` its own forward back. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module. RuntimeError: parts of it were frozen when accelerated.
    """
    _check("restore", model)
    found = [bound_forward(part) for part in model.modules()]
    if not all(bound.removable for bound in found if bound is not None):
        refuse("restore")
    for part in model.modules():
        remove(part)
    return model


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
