"""A Griffe extension for mkdocs.yml: what the docstrings of the package use and Markdown does not have.

Roles such as ``:class:`NVAE` `` become links, the ``::`` before a block of formulas is removed, and the fields of configuration
classes are documented by their help texts.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites docstrings after a module is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None and isinstance(obj, griffe.Attribute):
            text = _help(obj)
            if text and isinstance(obj.value, griffe.ExprCall):
                obj.docstring = griffe.Docstring(text, parent=obj)
                obj.value = obj.value.arguments[0]  # the default, which the signatures show
                init = obj.parent.members.get("__init__") if obj.parent is not None else None
                if isinstance(init, griffe.Function) and obj.name in init.parameters:
                    init.parameters[obj.name].default = obj.value
        if obj.docstring is not None:
            text = _ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)
            obj.docstring.value = re.sub(r"(?<=:):$", "", re.sub(r"^::$", "", text, flags=re.M), flags=re.M)


def _link(obj: griffe.Object, name: str) -> str:
    try:
        target = obj.resolve(name)
    except (griffe.NameResolutionError, griffe.BuiltinModuleError):
        target = name
    return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'


def _help(attribute: griffe.Attribute) -> str:
    """The help text and the unit of a field ``name: type = option(default, "help", unit="unit")``; empty for others."""
    if attribute.value is None:
        return ""
    call = ast.parse(str(attribute.value), mode="eval").body
    if (
        not isinstance(call, ast.Call)
        or not isinstance(call.func, ast.Name)
        or not call.func.id.endswith("option")
    ):
        return ""
    given = {word.arg: word.value for word in call.keywords}
    text = call.args[1] if len(call.args) > 1 else given.get("text")
    unit = ast.literal_eval(given["unit"]) if "unit" in given else ""
    return (ast.literal_eval(text) + (f" [{unit}]" if unit else "")) if text is not None else ""
