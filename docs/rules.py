"""What a public docstring must hold; CONTRIBUTING.md: formula, shapes, dtypes, errors, source."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import public
from public import Name

_SHAPE = re.compile(r"\((?:B|n|N|C|R|Z|G|C_out)(?:, [^()]+)*,?\)")
_FORMULA = re.compile(r"=|\|\||->|log|KL")
_DTYPE = re.compile(r"dtype|float32|float64|half precision|as given")
_SOURCE = re.compile(r"arXiv|et al|\([A-Z]\w+(, \w+)*, .*\d{4}\)|SC 2011")
# Code that refuses arguments.
_REFUSES = re.compile(r"\braise (?!NotImplementedError)\w+|\b_checks?[.(]|\b_check_\w+\(|\b_validated\(")
# Modules whose functions take and return feature maps.
_MAPS = re.compile(r"nvae_fast\.(ops\.(?!_)|distributions|nn)")


def broken(names: dict[str, Name]) -> list[str]:
    """A line for each rule that a public name breaks; empty when all is well."""
    return [f"{where}: {what}" for name in names.values() for where, what in _of(name)]


def _of(name: Name) -> Iterator[tuple[str, str]]:
    value, doc = name.value, name.doc
    if len(doc) < 20:
        yield name.full, "has no docstring worth the name"
        return
    if inspect.ismodule(value) or not callable(value):
        return
    whole = doc
    module = public.module(value)
    if module is not None:
        whole += "\n" + (module.__doc__ or "")
    if inspect.isclass(value):
        yield from _class(name, whole)
    else:
        yield from _call(name.full, value, doc)
    if _MAPS.match(value.__module__ or "") and name.short != "set_process_group":
        if not _SHAPE.search(whole):
            yield name.full, "names no shape such as (B, C, H, W)"
        if not _FORMULA.search(whole):
            yield name.full, "has no formula"
    if module is not None and not inspect.isclass(value):
        if not _DTYPE.search(whole):
            yield name.full, "says nothing about dtypes"
        if not _SOURCE.search(whole):
            yield name.full, "names no source (paper, section, equation)"


def _class(name: Name, doc: str) -> Iterator[tuple[str, str]]:
    value = name.value
    if dataclasses.is_dataclass(value):
        given = [field.name for field in dataclasses.fields(value)]
    elif issubclass(value, tuple):
        given = list(getattr(value, "_fields", ()))
    elif getattr(value, "_is_protocol", False):
        given = []
    else:
        given = public.parameters(value.__init__) if "__init__" in vars(value) else []
    said = doc + " ".join(public.field_helps(value))
    yield from _unnamed(name.full, given, said)
    for made in ("__init__", "__post_init__"):
        if public.own(vars(value).get(made)) and _refuses(vars(value)[made]) and "Raises" not in doc:
            yield name.full, "raises errors that its docstring does not name (Raises)"
    for member in public.members(value):
        where = f"{name.full}.{member.name}"
        if not member.doc:
            yield where, "has no docstring"
        elif member.kind != "property":
            yield from _call(where, member.function, member.doc, also=doc)


def _call(where: str, function: Any, doc: str, also: str = "") -> Iterator[tuple[str, str]]:
    yield from _unnamed(where, public.parameters(function), doc + also)
    if _refuses(function) and not re.search("Raises|[Ee]rrors? of", doc):
        yield where, "raises errors that its docstring does not name (Raises)"


def _unnamed(where: str, parameters: list[str], doc: str) -> Iterator[tuple[str, str]]:
    for parameter in parameters:
        if not re.search(rf"(?<!\w){re.escape(parameter)}(?!\w)", doc):
            yield where, f"does not say what {parameter} is"


def _refuses(function: Any) -> bool:
    function = inspect.unwrap(function)
    if not inspect.isfunction(function):
        return False
    try:
        return bool(_REFUSES.search(textwrap.dedent(inspect.getsource(function))))
    except OSError:  # made by dataclass
        return False
