"""Comparison of a forward of ours with the part's own: both run on copies, on a small random input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from nvae_fast import distributed
from nvae_fast.patching.bound import BoundForward, original
from nvae_fast.patching.clone import clone, perturb
from nvae_fast.patching.forwards import pair

# Relative: parts that agree are below 1e-6 in float32, whole cells (four batch norms in a row) below 1e-12 in float64.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-9}
FLOOR = 1e-3  # of the largest gradient: below it a gradient counts as this large (one that is zero is rounding noise)
SIZE = (8, 6)
SEED = 20071
PLAIN = (bool, int, float, str, type(None))  # what an attribute that is set again in every call may be
_NONE = object()
Own = Callable[[nn.Module, torch.Tensor], Any]


@contextmanager
def restored(device: torch.device) -> Iterator[None]:
    """A context with gradients that restores the modes and the random number generators."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """:func:`restored` without autocast, and with float32 computed in float32."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    with (
        restored(device),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul


def disagreement(
    bound: BoundForward,
    channels: Sequence[int],
    own: Own = original,
    gradients: bool = True,
    *,
    exact: bool = False,
) -> str | None:
    """Return why ``bound`` cannot replace ``own`` (the part's forward): a sentence, or None when it can.

    Attributes that ``own`` sets to constants are then in ``bound.constants``.

    Args:
        bound: the replacement.
        channels: numbers of input channels to try, until the part accepts one.
        own: what the part computes.
        gradients: whether to compare gradients.
        exact: compare in float64 on the CPU, for whole cells.
    """
    part = bound.module
    device = next((t.device for t in (*part.parameters(), *part.buffers())), torch.device("cpu"))
    if device.type == "meta":
        return "its parameters are on the meta device: there is nothing to compare"
    with undisturbed(device):
        dtype, device = (torch.float64, torch.device("cpu")) if exact else (torch.float32, device)
        base: Any = clone(part, dtype, device)
        generator = torch.Generator().manual_seed(SEED)
        perturb(base, generator)
        for inner in base.modules():
            if hasattr(inner, "init_done"):  # until the data-dependent initialisation its own forward runs
                inner.init_done = True
        gradients = gradients and not any(_strided_pointwise(m) for m in base.modules())
        first: str | None = None
        for c in channels:
            x = torch.randn((2, c, *SIZE), generator=generator).to(device, dtype)
            reason, ran = _compare(base, bound, x, own, gradients)
            if reason is None or ran:
                return reason
            first = first or reason
    return first or "the number of its input channels is unknown"


def communicates(module: nn.Module) -> bool:
    """Return whether ``module`` takes statistics over several processes in training mode: it is not run in that mode here."""
    return distributed.world_size() > 1 and any("Sync" in type(m).__name__ for m in module.modules())


def _compare(
    base: nn.Module, bound: BoundForward, x: torch.Tensor, own: Own, gradients: bool
) -> tuple[str | None, bool]:
    """Return the disagreement, and whether the part's own forward ran at all."""
    constants: dict[tuple[str, str], Any] = {}
    for mode, training in (("evaluation", False), *(() if communicates(base) else (("training", True),))):
        theirs, ours = clone(base, x.dtype).train(training), clone(base, x.dtype).train(training)
        try:
            expected = _observe(theirs, partial(own, theirs), x, gradients)
        except Exception as error:
            return f"its own forward raises in {mode} mode: {_line(error)}", training
        forward = BoundForward(ours, bound.kind, bound.settings, always=True)
        try:
            actual = _observe(ours, forward, x, gradients)
        except Exception as error:
            return f"ours raises in {mode} mode: {_line(error)}", True
        reason = _unlike(actual.tensors, expected.tensors, TOLERANCE[x.dtype])
        if reason is not None:
            return f"{reason[0]} in {mode} mode{reason[1]}", True
        left, reason_of_attributes = _attributes_unlike(actual, expected)
        other = torch.cat([x, x[:1]])[:, :, 2:]  # another input, in the state that the first has left
        again, ours_again = (
            _observe(theirs, partial(own, theirs), other, False).attributes,
            _observe(ours, forward, other, False).attributes,
        )
        for key, value in again.items():
            if key not in ours_again and (key not in left or left[key] != value):
                return (
                    f"its own forward sets attribute {_path(key)} in {mode} mode to what depends on the call",
                    True,
                )
        if reason_of_attributes is not None:
            return f"{reason_of_attributes} in {mode} mode", True
        if training and left != constants:
            key = next(k for k in (*left, *constants) if left.get(k, _NONE) != constants.get(k, _NONE))
            return (
                f"its own forward sets attribute {_path(key)} differently in training and in evaluation",
                True,
            )
        constants = left
    found: dict[str, dict[str, Any]] = {}
    for (prefix, name), value in constants.items():
        found.setdefault(prefix, {})[name] = value
    bound.constants = found
    return None, True


def _unlike(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> tuple[str, str] | None:
    """Return which tensor is different, and how; the output is compared first."""
    slopes = [float(t.norm()) for name, t in expected.items() if "gradient" in name and t is not None]
    floor = FLOOR * max(slopes, default=0.0)
    for name in (*expected, *(n for n in actual if n not in expected)):
        if name not in actual or name not in expected:
            return f"only {'its own' if name in expected else 'our'} forward sets {name}", ""
        found = _difference(actual[name], expected[name], tolerance, floor if "gradient" in name else 0.0)
        if found is not None:
            return f"{name} would differ", f": {found}"
    return None


def _attributes_unlike(
    actual: Observation, expected: Observation
) -> tuple[dict[tuple[str, str], Any], str | None]:
    """Return the plain values that only the part's own forward sets, and what else is different about attributes."""
    left: dict[tuple[str, str], Any] = {}
    for key, value in expected.attributes.items():
        if key not in actual.attributes:
            if not isinstance(value, PLAIN):
                return left, f"only its own forward sets attribute {_path(key)}, to a {type(value).__name__},"
            left[key] = value
            continue
        found = _difference(actual.attributes[key], value, TOLERANCE[torch.float32], 0.0)
        if found is not None:
            return left, f"attribute {_path(key)} would differ ({found})"
    for key in actual.attributes:
        if key not in expected.attributes:
            return left, f"only our forward sets attribute {_path(key)}"
    return left, None


def _path(key: tuple[str, str]) -> str:
    return ".".join(part for part in key if part)


class Observation(NamedTuple):
    """Effects of a forward: tensors by their description, and attributes that were set, by module and name."""

    tensors: dict[str, Any]
    attributes: dict[tuple[str, str], Any]


def _observe(
    module: nn.Module, forward: Callable[[torch.Tensor], Any], x: torch.Tensor, gradients: bool
) -> Observation:
    """Return the effects of ``forward``: output, gradients, and what it changes in the module and in its input."""
    torch.manual_seed(SEED)
    before = {name: _attributes(part) for name, part in module.named_modules()}
    leaf = x.clone().requires_grad_(gradients)
    given = leaf * 1
    with torch.set_grad_enabled(gradients):
        y = forward(given)
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"it returns {type(y).__name__}, not a tensor")
        if gradients and y.requires_grad:
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(SEED)).to(y)
            (y * weights).sum().backward()
    seen: dict[str, Any] = {"the output": y.detach(), "the input afterwards": given.detach()}
    if gradients:
        seen["the gradient of the input"] = leaf.grad
        seen |= {f"the gradient of {name}": p.grad for name, p in module.named_parameters()}
    seen |= {f"buffer {name}": buffer for name, buffer in module.named_buffers()}
    changed = {
        (prefix, name): value
        for prefix, part in module.named_modules()
        for name, value in _attributes(part).items()
        if name not in before[prefix] or before[prefix][name] is not value
    }
    return Observation(seen, changed)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes and parameters; buffers are compared by their values, since counting may rebind one or add in place."""
    plain = {
        k: v
        for k, v in module.__dict__.items()
        if k not in ("_parameters", "_buffers", "_modules", "forward")
    }
    return {**plain, **module._parameters}


def _difference(actual: Any, expected: Any, tolerance: float, least: float) -> str | None:
    if isinstance(actual, torch.Tensor) or isinstance(expected, torch.Tensor):
        missing = [t for t in (actual, expected) if t is None]
        if missing:  # an absent gradient is zero
            other = actual if expected is None else expected
            return None if float(other.norm()) <= tolerance * least else "one has none"
        if not isinstance(actual, torch.Tensor) or not isinstance(expected, torch.Tensor):
            return f"{type(expected).__name__} became {type(actual).__name__}"
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return f"{tuple(expected.shape)} {expected.dtype} became {tuple(actual.shape)} {actual.dtype}"
        a, e = actual.detach().double(), expected.detach().double()
        error, scale = float((a - e).norm()), max(float(e.norm()), least)
        if not error <= tolerance * scale:
            return f"relative error {error / scale if scale else error:.2g}, allowed {tolerance:g}"
        return None
    try:
        equal = type(actual) is type(expected) and bool(actual == expected)
    except Exception:  # something that cannot be compared
        equal = False
    return None if equal else "the values are different"


def _strided_pointwise(module: nn.Module) -> bool:
    """Return whether ``module`` is a strided 1x1 convolution, whose weight gradient in oneDNN may crash."""
    weight = getattr(module, "weight", None)
    pointwise = isinstance(weight, torch.Tensor) and weight.dim() == 4 and weight.shape[2:] == (1, 1)
    return pointwise and pair(getattr(module, "stride", 1)) != (1, 1)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
