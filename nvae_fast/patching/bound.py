"""Forwards of this package on instances of other modules: set in their ``__dict__``, and removed again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

import torch
from torch import nn

from nvae_fast import distributed
from nvae_fast.patching import wins

# kind -> forward(module, x, **settings). Filled by forwards.py and cells.py.
FORWARDS: dict[str, Callable[..., Any]] = {}
# kind -> (module, settings) -> name in the table of measurements ("" where the kernel always runs), whether it takes batch
# statistics.
PARTS: dict[str, Callable[..., tuple[str, bool]]] = {}
_REPLICATE = "_replicate_for_data_parallel"
MISSING = object()


class BoundForward:
    """A callable that runs the forward of ``kind`` on ``module``.

    An object and not a method: copy.deepcopy and pickle of the module make that of the copy bound to the copy (pickle cannot
    do so for methods that the class does not have). It takes the arguments of the module's own forward; where any but the
    first is not its default, the own forward runs. So it does in a graph that torch.export or torch.jit.trace records, which
    then needs no operators of this package.

    Args:
        module: the part.
        kind: key of FORWARDS.
        settings: keyword arguments of that forward.
        note: a remark for the report.
        constants: attributes that the own forward sets to constants, and which are set here too: path of a module inside
            the part -> name -> value.
        always: whether the kernel runs also where it is not known to be faster, as in comparisons.
    """

    constants: Mapping[str, Mapping[str, Any]] = {}
    parameters: dict[str, Any] | None = None  # of the own forward, and their defaults; read when needed
    always = False
    removable = True  # whether the part has another forward
    # The name of the part in the table of measurements, and whether it takes batch statistics; read when needed.
    part: tuple[str, bool] | None = None
    # Mode -> whether the kernel is faster, where accelerate has measured it.
    measured: Mapping[str, bool] = {}
    # The values of ``training`` in which the own forward always runs, and those in which it does outside autocast: the kernel
    # is hardly ever faster, so that asking would cost more (in a model some ten microseconds a call).
    rests: frozenset[bool] = frozenset()
    rests_in_float32: frozenset[bool] = frozenset()
    # (shape, whether contiguous, training mode, gradients, those of the input) -> whether the kernel is faster in float32 on
    # a CPU.
    decided: dict[tuple[torch.Size, bool, bool, bool, bool], bool]

    def __init__(
        self,
        module: nn.Module,
        kind: str,
        settings: dict[str, Any],
        note: str = "",
        constants: Mapping[str, Mapping[str, Any]] | None = None,
        always: bool = False,
    ) -> None:
        self.module, self.kind, self.settings, self.note = module, kind, settings, note
        self.constants = {} if constants is None else constants
        self.parameters = parameters_of(type(module))
        self.always = always
        self.decided = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.always:
            training = self.module.training
            if training in self.rests or (
                training in self.rests_in_float32 and not torch.is_autocast_enabled("cpu")
            ):
                return type(self.module).forward(self.module, *args, **kwargs)
        if len(args) == 1 and not kwargs:
            x = args[0]
        else:
            x = self._only_input(args, kwargs)
            if x is MISSING:
                return original(self.module, *args, **kwargs)
        # A frequent case, which shall cost little: some models have hundreds of parts that are faster as they are.
        if (
            not self.always
            and type(x) is torch.Tensor
            and x.is_cpu
            and x.dtype is torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        ):
            if not self._pays_as_known(x):
                return type(self.module).forward(self.module, x)
        elif (
            torch.compiler.is_exporting()
            or torch.jit.is_tracing()
            or not (self.always or torch.compiler.is_compiling() or self.pays(x))
        ):
            return original(self.module, x)
        if self.constants:
            self._set_constants()
        return FORWARDS[self.kind](self.module, x, **self.settings)

    def _only_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The input, where every other argument has its default."""
        if self.parameters is None:
            self.parameters = parameters_of(type(self.module))
        names = list(self.parameters)
        if not names or len(args) > len(names):
            return MISSING
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given or name not in self.parameters:
                return MISSING
            given[name] = value
        for name, value in given.items():
            default = self.parameters[name]
            same = value is default or (type(value) in (bool, int, float, str) and value == default)
            if name != names[0] and not same:
                return MISSING
        return given.get(names[0], MISSING)

    def pays(self, x: Any) -> bool:
        """Return whether the kernel is known to be faster for ``x``; for what kernels do not take, their forwards decide."""
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            return True
        if self.part is None:
            self.part = PARTS[self.kind](self.module, self.settings)
        part, normalises = self.part
        if not part:
            return True
        mode = wins.mode_of(self.module, x, normalises)
        if normalises and mode == "training" and distributed.world_size() > 1:
            return True  # batches may differ in size, and processes that merge statistics must decide alike
        known = self.measured.get(mode)
        return wins.wins(part, mode, x) if known is None else known

    def find_rests(self) -> None:
        """Set when the own forward runs without asking, by the tables or by what accelerate has measured."""
        part, normalises = self.part or PARTS[self.kind](self.module, self.settings)
        tensor = next(iter((*self.module.parameters(), *self.module.buffers())), None)
        if not part or tensor is None:
            return

        def hardly(dtype: torch.dtype) -> frozenset[bool]:
            return frozenset(
                training
                for training, mode in ((False, "evaluation"), (True, "training"))
                if not self.measured.get(mode, wins.often(part, tensor.device.type, dtype, mode))
            )

        self.rests = hardly(tensor.dtype)
        if normalises and self.measured:
            self.rests -= {True}  # processes that merge statistics must decide alike
        if tensor.dtype == torch.float32 and tensor.is_cpu:
            self.rests_in_float32 = self.rests
            self.rests &= hardly(torch.bfloat16)  # as under autocast

    def _pays_as_known(self, x: torch.Tensor) -> bool:
        """:meth:`pays` for a float32 map on a CPU outside autocast, by a look-up."""
        training, gradients = self.module.training, torch.is_grad_enabled()
        key = x.shape, x.is_contiguous(), training, gradients, gradients and x.requires_grad
        known = self.decided.get(key)
        if known is None:
            known = self.pays(x)
            if not training or (
                self.part is not None and not self.part[1]
            ):  # else it depends on the processes
                if len(self.decided) >= 64:
                    self.decided.clear()
                self.decided[key] = known
        return known

    def _set_constants(self) -> None:
        for path, values in self.constants.items():
            owner = self.module
            for name in path.split(".") if path else ():
                owner = owner._modules[name]  # type: ignore[assignment]
            for name, value in values.items():
                setattr(owner, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "parameters": None, "decided": {}}  # defaults are compared by identity

    # What torch.export and torch.jit.script read of a forward.

    @property
    def __code__(self) -> CodeType:
        return type(self.module).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(type(self.module).forward)
        return own.replace(parameters=list(own.parameters.values())[1:])

    @property
    def __globals__(self) -> dict[str, Any]:
        raise AttributeError(
            "call nvae_fast.restore(model) before torch.jit.script, which compiles the source of forward: accelerate has "
            "replaced that"
        )

    def install(self) -> None:
        if self.removable:
            self.find_rests()
        self.module.__dict__["forward"] = self
        self.module.__dict__[_REPLICATE] = _Replicate(self.module)

    def on(self, module: nn.Module) -> BoundForward:
        """The same forward, bound to ``module``."""
        copy = type(self)(module, self.kind, self.settings, self.note, self.constants, self.always)
        copy.part, copy.measured = self.part, self.measured
        return copy

    def installed_on(self, module: nn.Module) -> BoundForward:
        """Install the same forward on ``module``, bound to it."""
        copy = self.on(module)
        copy.install()
        return copy


def parameters_of(cls: type) -> dict[str, Any]:
    """The parameters of the forward of ``cls`` after self, and their defaults."""
    found: dict[str, Any] = {}
    for parameter in list(inspect.signature(cls.forward).parameters.values())[1:]:  # type: ignore[attr-defined]
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            found[parameter.name] = MISSING if parameter.default is parameter.empty else parameter.default
        elif parameter.kind is parameter.KEYWORD_ONLY:
            return {}  # only the first argument is known
    return found


class _Replicate:
    """Gives each replica of nn.DataParallel, which copies ``__dict__`` as it is, a forward bound to the replica."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        replica = getattr(type(self.module), _REPLICATE)(self.module)
        self.module.__dict__["forward"].installed_on(replica)
        return replica


OURS = ("forward", _REPLICATE)


def bound_forward(module: nn.Module) -> BoundForward | None:
    """Return the forward that was bound to ``module``, or None."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, BoundForward) else None


def remove(module: nn.Module) -> None:
    """Remove our forward from ``module``, if there is one and the module has another."""
    bound = bound_forward(module)
    if bound is not None and bound.removable:
        for name in OURS:
            module.__dict__.pop(name, None)


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of the class of ``module``."""
    return type(module).forward(module, *args, **kwargs)
