"""Forwards of this package on instances of other modules: set in their ``__dict__``, and removed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# kind -> forward(module, x, **settings). Filled by forwards.py.
FORWARDS: dict[str, Callable[..., Any]] = {}
_REPLICATE = "_replicate_for_data_parallel"


class BoundForward:
    """A callable that runs the forward of ``kind`` on ``module``.

    An object and not a method: copy.deepcopy and pickle of the module make that of the copy bound to the copy (pickle cannot
    do so for methods that the class does not have). ``note``: a remark for the report.
    """

    def __init__(self, module: nn.Module, kind: str, settings: dict[str, Any], note: str = "") -> None:
        self.module, self.kind, self.settings, self.note = module, kind, settings, note

    def __call__(self, x: Any) -> Any:
        return FORWARDS[self.kind](self.module, x, **self.settings)

    def install(self) -> None:
        self.module.__dict__["forward"] = self
        self.module.__dict__[_REPLICATE] = _Replicate(self.module)

    def installed_on(self, module: nn.Module) -> BoundForward:
        """Install the same forward on ``module``, bound to it."""
        copy = BoundForward(module, self.kind, self.settings, self.note)
        copy.install()
        return copy


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
    """Remove our forward from ``module``, if there is one."""
    if bound_forward(module) is not None:
        for name in OURS:
            module.__dict__.pop(name, None)


def original(module: nn.Module, x: Any) -> Any:
    """Run the forward of the class of ``module``."""
    return type(module).forward(module, x)
