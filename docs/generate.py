"""Writes docs/api/: a page for each public name, from its signature and docstring.

    python docs/generate.py            write the pages
    python docs/generate.py --check    fail when a page is out of date or a docstring lacks what rules.py asks

Needs the package alone. tests/test_docs.py runs the check.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import public  # noqa: E402
import render  # noqa: E402
import rules  # noqa: E402
from public import Name  # noqa: E402

API = HERE / "api"
_GENERATED = "<!-- Made by docs/generate.py from the docstrings; edit those. -->"


def page(name: Name, known: dict[str, Name]) -> str:
    """The page of one public name."""
    resolve = render.Links(name, known)
    value = name.value
    parts = [_GENERATED, f"# {name.full}"]
    if inspect.ismodule(value):
        parts += [render.text(inspect.getdoc(value) or "", resolve), table(value.__name__, known, resolve)]
        return _joined(parts)
    if not callable(value):
        parts.append(render.text(name.doc, resolve))
        if not isinstance(value, str):  # the version changes too often
            parts.append(f"```python\n{render.value(value)}\n```")
        parts.append(_source(name))
        return _joined(parts)
    parts += [render.signature(name.full, value), render.text(name.doc, resolve)]
    fields = public.field_helps(value)
    if fields:
        rows = [f"- `{field}`: {help}" for field, help in fields.items()]
        parts.append("**Fields**\n\n" + "\n".join(rows))
    for member in public.members(value):
        heading = f"### {member.name}"
        parts += [heading, render.signature(member.name, member.function, member.kind)]
        parts.append(render.text(member.doc, resolve))
    module = public.module(value)
    if module is not None:
        parts += ["## Formulas", render.text(inspect.getdoc(module) or "", resolve)]
    parts.append(_source(name))
    return _joined(parts)


def table(module: str, known: dict[str, Name], resolve: render.Links) -> str:
    """Every public name of a module with the first sentence about it."""
    rows = ["| name | |", "|---|---|"]
    for name in known.values():
        if name.module == module:
            summary = render.summary(name.doc, resolve).replace("|", "\\|")
            rows.append(f"| [`{name.short}`]({name.full}.md) | {summary} |")
    return "\n".join(rows)


def index(known: dict[str, Name]) -> str:
    parts = [
        _GENERATED,
        "# Public names",
        "One page each. What is not listed here may change in any release.",
    ]
    for module, title in public.MODULES.items():
        anchor = next(iter(known.values()))
        parts += [f"## {module}", title, table(module, known, render.Links(anchor, known))]
    return _joined(parts)


def pages() -> dict[str, str]:
    """{file name: text} of all of docs/api."""
    known = public.names()
    return {"index.md": index(known), **{f"{full}.md": page(name, known) for full, name in known.items()}}


def _source(name: Name) -> str:
    where = public.source(name)
    return f"Source: [`{where}`](../../{where})"


def _joined(parts: list[str]) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def out_of_date(folder: Path, made: dict[str, str]) -> list[str]:
    """What differs between the pages in ``folder`` and those made, one line each."""
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    lines = [f"{name}: has no page" for name in sorted(set(made) - set(there))]
    lines += [f"{name}: is no public name any more" for name in sorted(set(there) - set(made))]
    lines += [
        f"{name}: is out of date" for name in sorted(made) if name in there and there[name] != made[name]
    ]
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail when something is to do")
    parser.add_argument("--out", type=Path, default=API, help="folder of the pages (default: docs/api)")
    options = parser.parse_args(arguments)
    made = pages()
    found: list[Any] = rules.broken(public.names())
    if options.check:
        stale = out_of_date(options.out, made)
        found += [f"{line}; run python docs/generate.py" for line in stale]
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        for path in options.out.glob("*.md"):
            path.unlink()
        for name, text in made.items():
            (options.out / name).write_text(text, encoding="utf-8")
        print(f"{len(made)} pages in {options.out}")
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
