"""``define_op``: a PyTorch operator from one plain function, its formula.

The formula is ordinary PyTorch. Its signature is the operator's schema, it is the operator's default kernel, its
vector-Jacobian product is the default backward, and it is what every fused kernel is tested against::

    def _reference(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
        ...

    _op = define_op(
        "my_op",
        _reference,
        fake=lambda x, *_: empty_map(x, x.shape[1]),    # shape, dtype and layout of the result
        differentiable=("x", "scale"),
        triton="my_op",                                 # nvae_fast.kernels.my_op.my_op runs it on a GPU
        fused_backward=True,                            # and my_op_backward its gradient
    )

registers ``torch.ops.nvae_fast.my_op(Tensor x, Tensor? scale, float eps) -> Tensor`` and, for ``fused_backward``,
``my_op_backward(Tensor grad, Tensor x, Tensor? scale, float eps, bool need_x, bool need_scale) -> (Tensor, Tensor)``. The C++
extension adds kernels to both by these names. ``_op(x, scale, eps)`` has the types of the formula. The public function checks
its arguments, where they have names and defaults, and calls it; the operator itself trusts them.

A call goes, for every operator, where :func:`nvae_fast.ops._backend.fused` says: to the fused kernel where the device has one,
else to the formula. The formula also takes over under functional transforms and forward-mode differentiation, which a kernel
cannot follow; and float64 on a GPU, where kernels compute in float32.

:func:`define_kernel` registers an internal operator: without gradients, called with the arguments of its schema as they are.
"""

from __future__ import annotations

import importlib
import typing
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from nvae_fast.ops import _backend, _devices, _memory, _schemas
from nvae_fast.ops._layout import empty_map

NAMESPACE = "nvae_fast"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

P = ParamSpec("P")
R = TypeVar("R")
Tensors = Sequence[Tensor]
Grads = Sequence[Tensor | None]
Gradients = dict[str, Tensor | None]
# backward(grads of the outputs, names of the arguments whose gradients are wanted, the arguments, the saved outputs)
Backward = Callable[[Grads, frozenset[str], Any, Tensors], Gradients]
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


@dataclass(frozen=True)
class Definition:
    """The parts of ``torch.ops.nvae_fast.<name>``."""

    formula: Callable[..., Any]
    fake: Callable[..., Any]
    launch: Callable[..., Any] | None  # its Triton kernels, or the formula for float64


DEFINITIONS: dict[str, Definition] = {}


def refuse_double_backward(
    name: str, instead: str = "use nvae_fast.use_backend('reference') for create_graph=True"
) -> None:
    """Raise while autograd would record the backward pass: the gradients of a fused kernel have no graph."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: double backward is not supported; {instead}")


# ------------------------------------------------------------------------------ registration


def schema_of(formula: Callable[..., Any], mutates: Sequence[str] = (), symbolic_sizes: bool = False) -> str:
    """The schema that follows from the annotations of ``formula``. An int is a constant of a compiled graph, unless it is a
    size."""
    hints = typing.get_type_hints(formula)  # not every PyTorch resolves annotations that are strings
    formula.__annotations__ = {**hints, "return": None} if hints["return"] is type(None) else hints
    schema = torch.library.infer_schema(formula, mutates_args=mutates)
    return schema if symbolic_sizes else schema.replace("SymInt", "int")


def _arguments(schema: str) -> list[tuple[str, str]]:
    """(type, name) of every argument."""
    inside = schema[1 : schema.index(") -> ")]
    split = (argument.partition("=")[0].rsplit(" ", 1) for argument in inside.split(", "))
    return [(kind, name) for kind, name in split]


def _named(names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    """Values in the order of ``names`` as a tuple with these names."""
    made: Any = namedtuple("Arguments", names)  # type: ignore[misc]
    return made._make


def _is_float64(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_float64, value))
    return (value.dtype if isinstance(value, Tensor) else value) is torch.float64


def kernels(module: str) -> Any:
    """A module of ``nvae_fast.kernels``, which need Triton: imported when one is launched."""
    return importlib.import_module(f"nvae_fast.kernels.{module}")


def _launcher(
    name: str, triton: str | Callable[..., Any], formula: Callable[..., Any], float64: bool
) -> Callable[..., Any]:
    """The function that launches Triton kernels. They compute in float32: unless they support ``float64``, the formula
    computes it."""

    def launch(*args: Any) -> Any:
        if not float64 and any(map(_is_float64, args)):
            return formula(*args)
        if callable(triton):
            return triton(*args)
        module, _, function = triton.partition(".")
        return getattr(kernels(module), function or name)(*args)

    return launch


def _register(
    name: str, schema: str, formula: Callable[..., Any], fake: Callable[..., Any],
    triton: str | Callable[..., Any] | None, float64: bool = False,
) -> Any:  # fmt: skip
    if name in DEFINITIONS:
        raise RuntimeError(
            f"operator {NAMESPACE}::{name} is defined already: a module of nvae_fast.ops cannot be imported twice; start a "
            "new process"
        )
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, formula, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    launch = None if triton is None else _launcher(name, triton, formula, float64)
    if launch is not None and _backend.triton_reason() is None:
        LIBRARY.impl(name, _devices.by_device(launch, formula), "CUDA")
    DEFINITIONS[name], _schemas.SCHEMAS[name] = Definition(formula, fake, launch), schema
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_kernel(
    name: str,
    formula: Callable[P, R],
    *,
    fake: Callable[..., Any],
    triton: str | Callable[..., Any] | None = None,
    mutates: Sequence[str] = (),
) -> Callable[P, R]:
    """Register ``nvae_fast::<name>`` without gradients and return it; its arguments are trusted.

    Args:
        name: of the operator and of its kernels.
        formula: the operator in plain PyTorch.
        fake: uninitialised results of the right shapes, dtypes and layouts.
        triton: ``"module"`` or ``"module.function"`` of ``nvae_fast.kernels`` that launches the Triton kernel (the function
            has the operator's name by default), or a function that does.
        mutates: names of the arguments that it writes to.
    """
    return typing.cast("Callable[P, R]", _register(name, schema_of(formula, mutates), formula, fake, triton))


def define_op(
    name: str,
    formula: Callable[P, R],
    *,
    fake: Callable[..., Any],
    differentiable: Sequence[str] | None = None,
    outputs: Sequence[str] = (),
    triton: str | Callable[..., Any] | None = None,
    backward: Backward | None = None,
    fused_backward: bool | Callable[..., Any] = False,
    gradient: Callable[[Any, str], Tensor] | None = None,
    saves: Mapping[int, str | None] | None = None,
    constant_outputs: Mapping[int, str | None] | None = None,
    backend: str | None = None,
    float64: bool = False,
    opaque: bool = False,
) -> Operator[P, R]:
    """Register ``nvae_fast::<name>`` with its gradients, fake and Triton kernels; see the module's docstring.

    Args:
        name: of the operator and of its kernels.
        formula: the operator in plain PyTorch. A result must be a tensor of its own, no view of an argument.
        fake: uninitialised results of the right shapes, dtypes and layouts.
        differentiable: names of the arguments that receive gradients; None where no argument could require one.
        outputs: names of the results; the arguments of a derived backward operator are called after them.
        triton: as for :func:`define_kernel`.
        backward: gradients by name where a composition of operators computes them; by default the formula's
            vector-Jacobian product.
        fused_backward: ``<name>_backward``, an operator derived from this one, has its own kernels; or the
            function that launches those in Triton.
        gradient: ``gradient(args, name)``, uninitialised: dtype and layout of what these kernels return. By default the
            argument's dtype and the memory format of the first argument.
        saves: positions of the results that ``backward`` is given, each with the argument that must be true or given for
            it, or None.
        constant_outputs: positions of the results that carry no gradient, each with the argument that gives it one where it
            is true or given, or None.
        backend: the row of :func:`nvae_fast.backends` that says what runs it; by default its own.
        float64: the Triton kernels support float64.
        opaque: torch.compile sees the operator, never its formula, and ints may be symbolic (they are sizes).
    """
    schema = schema_of(formula, symbolic_sizes=opaque)
    overload = _register(name, schema, formula, fake, triton, float64)
    arguments = _arguments(schema)
    names = [argument for _, argument in arguments]
    tensors = [i for i, (kind, _) in enumerate(arguments) if kind in ("Tensor", "Tensor?")]
    if differentiable is None:
        return Operator(overload, tensors[0], backend, None, opaque)
    where = [names.index(argument) for argument in differentiable]
    kernel = None
    if fused_backward:
        launcher = fused_backward if callable(fused_backward) else triton
        kernel = _derive_backward(name, schema, formula, where, outputs, launcher, gradient)
    rules = [
        [(i, None if argument is None else names.index(argument)) for i, argument in (rule or {}).items()]
        for rule in (saves, constant_outputs)
    ]
    autograd = _Autograd(name, formula, names, tensors, where, rules[0], rules[1], backward, kernel)
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", autograd.backward, setup_context=autograd.setup_context, lib=LIBRARY
    )
    return Operator(overload, tensors[0], backend, autograd.function(overload._op), opaque)


# -------------------------------------------------------------------------------- dispatch


class Operator(Generic[P, R]):
    """An operator with gradients. Call it with the formula's arguments, by position."""

    def __init__(
        self, overload: Any, first_tensor: int, backend: str | None, differentiable: Callable[..., Any] | None,
        opaque: bool = False,
    ) -> None:  # fmt: skip
        self.name: str = overload._opname
        self.formula: Callable[P, R] = DEFINITIONS[self.name].formula
        self.overload, self.backend = overload, backend or self.name
        self._kernel = overload._op  # without a call between
        self._first_tensor, self._opaque, self._differentiable = first_tensor, opaque, differentiable
        LISTED[self.name] = self.backend

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[self._first_tensor]  # its device decides
        device = first.device if isinstance(first, Tensor) else first[0].device
        if not _backend.fused(self.backend, device):
            if self._opaque and torch.compiler.is_compiling() and not _backend.transforms_active():
                return self.overload(*args, **kwargs)
            return self.formula(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self.overload(*args, **kwargs)
        try:
            if self._differentiable is None:
                return self._kernel(*args, **kwargs)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return self._differentiable(*args, **kwargs)
            with torch._C._AutoDispatchBelowAutograd():
                return self._kernel(*args, **kwargs)
        except RuntimeError as error:
            _memory.reraise(error)
            raise

    def without_grad(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The kernel, or else the formula, on arguments that are trusted; no gradients."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._kernel(*args, **kwargs)


LISTED: dict[str, str] = {}  # operator -> row of backends()
COMPOSED: dict[str, Sequence[str]] = {}  # function over operators -> these


def compose(name: str, parts: Sequence[str]) -> None:
    """List ``name``, a function over other operators, in backends(): it runs fused where all of them do."""
    COMPOSED[name] = parts


# ------------------------------------------------------------------------------- gradients


@dataclass
class _Autograd:
    """An operator's side of autograd: which tensors are saved, and how gradients come of them."""

    name: str
    formula: Callable[..., Any]
    names: Sequence[str]  # of the arguments
    tensors: Sequence[int]  # positions of tensors
    where: Sequence[int]  # positions of tensors to differentiate
    saves: Sequence[tuple[int, int | None]]  # (result, argument that must be true or given for it)
    constant_outputs: Sequence[tuple[int, int | None]]  # (result, argument that gives it a gradient)
    composed: Backward | None
    kernel: Callable[..., Any] | None  # <name>_backward

    def __post_init__(self) -> None:
        self.arguments = _named(self.names)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        results = output if isinstance(output, tuple) else (output,)
        kept = []
        for i, when in self.saves:
            if when is None or (inputs[when] is not None and inputs[when] is not False):
                kept.append(results[i])
        constants = []
        for i, unless in self.constant_outputs:
            if unless is None or inputs[unless] is None or inputs[unless] is False:
                constants.append(results[i])
        if constants:
            ctx.mark_non_differentiable(*constants)
        ctx.save_for_backward(*map(inputs.__getitem__, self.tensors), *kept)
        ctx.arguments = list(inputs)
        for i in self.tensors:
            ctx.arguments[i] = None

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward(self.name)
        args, saved, needs = ctx.arguments.copy(), ctx.saved_tensors, ctx.needs_input_grad
        for i, value in zip(self.tensors, saved, strict=False):
            args[i] = value
        result: list[Tensor | None] = [None] * len(args)
        wanted = [i for i in self.where if needs[i]]
        if not wanted or all(grad is None for grad in grads):
            return tuple(result)
        kept = saved[len(self.tensors) :]
        if torch.compiler.is_compiling() or (self.composed is None and self.kernel is None):
            found = self.gradients(grads, args, needs, kept)
        else:  # nothing is recorded here; the detour through autograd's fallback doubles the cost of a call
            try:
                with torch._C._AutoDispatchBelowAutograd():
                    found = self.gradients(grads, args, needs, kept)
            except RuntimeError as error:
                _memory.reraise(error)
                raise
        for i in wanted:
            result[i] = found[i]
        return tuple(result)

    def gradients(
        self, grads: Grads, args: list[Any], needs: Sequence[bool], kept: Tensors
    ) -> Mapping[int, Tensor | None]:
        """By the argument's position."""
        if self.composed is not None:
            wanted = frozenset(self.names[i] for i in self.where if needs[i])
            found = self.composed(grads, wanted, self.arguments(args), kept)
            return {i: found.get(self.names[i]) for i in self.where}
        if self.kernel is None:
            return vjp(self.formula, self.where, grads, args, needs)
        if len(self.where) == 1:
            return {self.where[0]: self.kernel(*grads, *args)}
        return dict(zip(self.where, self.kernel(*grads, *args, *(needs[i] for i in self.where)), strict=True))

    def function(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """``kernel`` with gradients, for eager calls. The operator's registered autograd, which compilers see, does the same
        but costs a tenth of a millisecond a call."""
        autograd = self

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    outputs = kernel(*args)
                autograd.setup_context(ctx, args, outputs)
                return outputs

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                return autograd.backward(ctx, *grads)

        # Without Function.apply's own look for functional transforms: where this is called there is none.
        return super(torch.autograd.Function, Differentiable).apply


def vjp(
    formula: Callable[..., Any], where: Sequence[int], grads: Grads, args: Sequence[Any], needs: Sequence[bool]
) -> dict[int, Tensor | None]:  # fmt: skip
    """The vector-Jacobian product of ``formula`` at ``args``: gradients by position, of the arguments at ``where`` of which
    ``needs`` is true; None where nothing depends on one."""
    values, leaves = list(args), {}
    # A kernel runs below autograd, where nothing would be recorded.
    with torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False), torch.enable_grad():
        for i in where:
            if needs[i] and values[i] is not None:
                values[i] = leaves[i] = values[i].detach().requires_grad_(True)
        results = formula(*values)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None and y.requires_grad]
        if not pairs:
            return dict.fromkeys(leaves)
        found = torch.autograd.grad(
            [y for y, _ in pairs], [*leaves.values()], [g.to(y.dtype) for y, g in pairs], allow_unused=True
        )
    return dict(zip(leaves, found, strict=True))


def _derive_backward(
    name: str, schema: str, formula: Callable[..., Any], where: Sequence[int], outputs: Sequence[str],
    triton: str | Callable[..., Any] | None, gradient: Callable[[Any, str], Tensor] | None,
) -> Any:  # fmt: skip
    """Register ``<name>_backward(grads of the outputs, arguments, which gradients are needed) -> gradients``. A gradient that
    is not needed comes back empty; where there is one argument to differentiate, it always is."""
    arguments = _arguments(schema)
    names, several = [argument for _, argument in arguments], len(where) > 1
    kind = "Tensor?" if len(outputs) > 1 else "Tensor"
    grads = [f"{kind} grad_{output}" for output in outputs] or ["Tensor grad"]
    needs = [f"bool need_{names[i]}" for i in where] if several else []
    inside = ", ".join([*grads, *(f"{kind} {argument}" for kind, argument in arguments), *needs])
    returns = f"({', '.join(['Tensor'] * len(where))})" if several else "Tensor"
    make, first, last = _named(names), len(grads), len(grads) + len(arguments)

    def needed(flat: Sequence[Any]) -> list[bool]:
        """Of every argument."""
        flags = dict(zip(where, flat[last:] or [True], strict=True))
        return [flags.get(i, False) and flat[first + i] is not None for i in range(len(arguments))]

    def fake(*flat: Any) -> Any:
        args, like, needs = make(flat[first:last]), flat[first], needed(flat)
        found = []
        for i in where:
            value = like if args[i] is None else args[i]
            if not needs[i]:
                found.append(like.new_empty(0, dtype=value.dtype))
            elif gradient is not None:
                found.append(gradient(args, names[i]))
            else:
                found.append(empty_map(like, value.shape[1], value.dtype))
        return tuple(found) if several else found[0]

    def of_formula(*flat: Any) -> Any:
        found = fake(*flat)
        gradients = vjp(formula, where, flat[:first], flat[first:last], needed(flat))
        for i, out in zip(where, found if several else (found,), strict=True):
            value = gradients.get(i)
            if value is not None:
                out.copy_(value)
            else:  # not needed, hence empty; or nothing depends on it
                out.zero_()
        return found

    return _register(f"{name}_backward", f"({inside}) -> {returns}", of_formula, fake, triton)
