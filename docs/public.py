"""What is public, and what is known about it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Their __all__ is what is public.
MODULES = {
    "nvae_fast": "The model, the operations it is made of, and the switches.",
    "nvae_fast.nn": "Modules: they own parameters and call the operations.",
    "nvae_fast.distributions": "Distributions for models built elsewhere.",
    "nvae_fast.models.likelihoods": "What `NVAE.likelihood` returns.",
    "nvae_fast.training": "Training, evaluation, sampling.",
    "nvae_fast.data": "Images, batches, pictures.",
}


@dataclass(frozen=True)
class Name:
    """A public name: ``full`` as users write it, ``module`` the one whose ``__all__`` has it."""

    module: str
    short: str
    value: Any
    doc: str

    @property
    def full(self) -> str:
        return f"{self.module}.{self.short}"


@dataclass(frozen=True)
class Member:
    """A public method or property of a class; ``kind`` is "method", "classmethod", "staticmethod" or "property"."""

    name: str
    kind: str
    function: Callable[..., Any]
    doc: str


def names() -> dict[str, Name]:
    """{full name: Name} in the order of MODULES and of each ``__all__``."""
    found = {}
    for module in MODULES:
        home = import_module(module)
        for short in home.__all__:
            value = getattr(home, short)
            name = Name(module, short, value, _doc(home, short, value))
            found[name.full] = name
    return found


def _doc(home: ModuleType, short: str, value: Any) -> str:
    if inspect.ismodule(value) or callable(value):
        own = value.__doc__
        return inspect.cleandoc(own) if own else ""
    return _constant_doc(home, short)


def _constant_doc(home: ModuleType, short: str) -> str:
    """The string below the assignment of a constant, in ``home`` or where ``home`` imports it from."""
    tree = ast.parse(inspect.getsource(home))
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == short for target in targets):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                return inspect.cleandoc(str(following.value.value))
            return ""
        if isinstance(node, ast.ImportFrom) and any(alias.name == short for alias in node.names):
            return _constant_doc(
                import_module("." * node.level + (node.module or ""), home.__package__), short
            )
    return ""


def own(value: Any) -> bool:
    """Whether the package wrote it."""
    return (getattr(value, "__module__", "") or "").split(".")[0] == "nvae_fast"


def members(value: Any) -> list[Member]:
    """Public methods and properties that a class defines itself, in the order written."""
    found: list[Member] = []
    if not inspect.isclass(value) or issubclass(value, tuple):
        return found
    for name, entry in vars(value).items():
        kind, function = "method", entry
        if isinstance(entry, (classmethod, staticmethod)):
            kind, function = type(entry).__name__, entry.__func__
        elif isinstance(entry, property):
            kind, function = "property", entry.fget
        elif type(entry).__name__ == "cached_property":
            kind, function = "property", entry.func
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        own_doc = function.__doc__
        if name == "extra_repr" or (
            name == "forward" and not own_doc
        ):  # forward: the class says what it computes
            continue
        found.append(Member(name, kind, function, inspect.cleandoc(own_doc) if own_doc else ""))
    return found


def field_helps(value: Any) -> dict[str, str]:
    """{field: help text with its unit} of a dataclass whose fields carry their help."""
    if not inspect.isclass(value) or not dataclasses.is_dataclass(value):
        return {}
    helps = {}
    for field in dataclasses.fields(value):
        if "help" in field.metadata:
            unit = field.metadata.get("unit")
            helps[field.name] = field.metadata["help"] + (f" [{unit}]" if unit else "")
    return helps


def module(value: Any) -> ModuleType | None:
    """The module of an op, whose docstring has the formulas; None for what is no op."""
    module = getattr(value, "__module__", "") or ""
    is_op = module.startswith("nvae_fast.ops.") and not module.startswith("nvae_fast.ops._")
    return sys.modules[module] if is_op else None


def source(name: Name) -> str:
    """The file that defines it, from the repository's root."""
    module = getattr(name.value, "__module__", None) or name.module
    if inspect.ismodule(name.value):
        module = name.value.__name__
    path = Path(inspect.getsourcefile(sys.modules[module]) or "")
    return path.resolve().relative_to(ROOT).as_posix()


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters, without self and cls; empty where there is no signature to see."""
    try:
        found = inspect.signature(function).parameters
    except (ValueError, TypeError):
        return []
    return [name for name in found if name not in ("self", "cls")]
