"""Docstrings and signatures as Markdown."""

from __future__ import annotations

import inspect
import pprint
import re
from collections.abc import Callable
from typing import Any, ForwardRef

from public import Name

_SECTIONS = ("Args:", "Returns:", "Raises:", "Attributes:")
_ROLE = re.compile(r":(?:func|class|meth|mod):`~?([^`]+)`")
_WIDTH = 100


class Links:
    """Turns ``:class:`NVAEConfig` `` on the page of a name into a link to the page meant."""

    def __init__(self, name: Name, known: dict[str, Name]) -> None:
        self.name, self.known = name, known

    def __call__(self, target: str) -> str:
        owner = target.rpartition(".")[0]
        prefixes = ("", f"{self.name.module}.", "nvae_fast.")
        for candidate in (target, owner):
            for full in (prefix + candidate for prefix in prefixes):
                if candidate and full in self.known and full != self.name.full:
                    return f"[`{target}`]({full}.md)"
        return f"`{target}`"


def text(doc: str, resolve: Links) -> str:
    """A docstring: paragraphs, sections with their entries as lists, indented blocks as code."""
    out: list[str] = []
    lines = re.sub(r"in the\s+module's docstring", "below", doc).splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.strip() in _SECTIONS:
            block, at = _indented(lines, at + 1)
            told = (
                [_inline(part, resolve) for part in block]
                if line.strip() == "Returns:"
                else _entries(block, resolve)
            )
            out += ["", f"**{line.strip()[:-1]}**", "", *told, ""]
        elif line.startswith("    "):
            block, at = _indented(lines, at)
            out += ["", "```text", *block, "```", ""]
        else:
            at += 1
            if line.strip() == "::":
                continue
            line = re.sub(r"::$", ":", line)
            out.append(_inline(line, resolve))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def _indented(lines: list[str], at: int) -> tuple[list[str], int]:
    """The indented lines from ``at`` on, their indentation taken off, and where they end."""
    block = []
    while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
        block.append(lines[at][4:])
        at += 1
    while block and not block[-1].strip():
        block.pop()
    return block, at


def _entries(block: list[str], resolve: Links) -> list[str]:
    """``name: text`` entries, continued on deeper lines, as a list."""
    found: list[str] = []
    for line in block:
        if line.startswith("    ") and found:
            found[-1] += " " + line.strip()
        elif line.strip():
            found.append(line.strip())
    out = []
    for entry in found:
        named = re.match(r"([\w*, ()]+?): (.*)", entry)
        if named:
            names = re.sub(r"\w+", lambda word: f"`{word[0]}`", re.sub(r" \(.*?\)", "", named[1]))
            shape = re.findall(r"\(.*?\)", named[1]) if len(named[1].split(" (")) == 2 else []
            out.append(f"- {names}{' ' + shape[0] if shape else ''}: {_inline(named[2], resolve)}")
        else:
            out.append(f"- {_inline(entry, resolve)}")
    return out


def _inline(line: str, resolve: Links) -> str:
    """Roles to links, double backticks to single; what Markdown would take for its own is escaped."""
    line = _ROLE.sub(lambda found: "\0" + resolve(found[1]) + "\0", line)
    line = re.sub(r"``(.+?)``", r"`\1`", line)
    pieces = re.split(r"(\0.*?\0|`[^`]*`)", line)
    for i in range(0, len(pieces), 2):
        bold = re.split(r"(\*\*\w.*?\*\*)", pieces[i])
        bold[::2] = [re.sub(r"([*<])", r"\\\1", piece) for piece in bold[::2]]
        pieces[i] = "".join(bold)
    return "".join(pieces).replace("\0", "")


def summary(doc: str, resolve: Links) -> str:
    """The first sentence."""
    first = " ".join(doc.split("\n\n")[0].split())
    first = re.split(r"(?<=[.:;])\s", first)[0].rstrip(".:;")
    return _inline(first, resolve)


def value(constant: Any) -> str:
    """A constant: a mapping by its keys, which is what one needs to know."""
    if isinstance(constant, dict):
        return f"keys: {', '.join(map(repr, constant))}"
    return pprint.pformat(constant, width=_WIDTH)


def _annotation(annotation: Any) -> str:
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def signature(name: str, function: Callable[..., Any], kind: str = "") -> str:
    """A code block with the call; the same on every Python."""
    prefix = "class " if inspect.isclass(function) else ""
    if inspect.isclass(function) and issubclass(function, tuple):
        fields = ", ".join(getattr(function, "_fields", ()))
        return f"```python\nclass {name}({fields})  # a named tuple\n```"
    if inspect.isclass(function) and issubclass(function, Exception):
        return f"```python\nclass {name}({function.__mro__[1].__name__})\n```"
    try:
        found = inspect.signature(function)
    except (ValueError, TypeError):
        return f"```python\n{prefix}{name}\n```"
    if kind == "property":
        return f"```python\n{name}: {_annotation(found.return_annotation)}\n```"
    words, star = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        word = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            word, star = f"*{word}", True
        elif parameter.kind is parameter.VAR_KEYWORD:
            word = f"**{word}"
        elif parameter.kind is parameter.KEYWORD_ONLY and not star:
            words.append("*")
            star = True
        if parameter.annotation is not parameter.empty:
            word += f": {_annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            shown = parameter.default
            word += f" = {getattr(shown, '__name__', None) or repr(shown)}"
        words.append(word)
    returns = ""
    if not inspect.isclass(function) and found.return_annotation is not found.empty:
        returns = f" -> {_annotation(found.return_annotation)}"
    call = f"{prefix}{name}({', '.join(words)}){returns}"
    if len(call) > _WIDTH:
        call = f"{prefix}{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){returns}"
    if kind in ("classmethod", "staticmethod"):
        call = f"@{kind}\n{call}"
    return f"```python\n{call}\n```"
