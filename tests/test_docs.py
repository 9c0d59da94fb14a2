"""The reference shows every public name, and the docstrings it is made from hold what readers need. `make docs` builds it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import nvae_fast as nf

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
SHOWN = [name for text in PAGES.values() for name in re.findall(r"^::: ([\w.]+)$", text, re.M)]
MODULES = [name for name in SHOWN if not name.startswith("nvae_fast.ops.")]

SHAPE = re.compile(r"\((?:B|n|N|C|R|Z|G|C_out)(?:, [^()]+)*,?\)")
FORMULA = re.compile(r"=|\|\||->|log|KL")
DTYPE = re.compile(r"dtype|float32|float64|half precision|as given")
PAPER = re.compile(r"arXiv|et al|\([A-Z]\w+(, \w+)*, .*\d{4}\)|SC 2011")
# A function whose source matches raises errors, itself or by a check of its arguments: its docstring needs "Raises".
REFUSES = re.compile(r"\braise \w+|\b_checks?[.(]|\b_check_\w+\(|\b_validated\(")
OP = re.compile(r"nvae_fast\.ops\.(?!_)")
# Modules whose functions take and return feature maps.
MAPS = re.compile(r"nvae_fast\.(ops\.(?!_)|distributions|nn)")


def public() -> dict[str, Any]:
    """{full name: value} of all that the reference shows."""
    return {
        f"{module}.{short}": getattr(sys.modules[module], short)
        for module in MODULES
        for short in import_module(module).__all__
    }


def broken(name: str, value: Any) -> Iterator[str]:
    """What the docstring of a public function or class lacks, one line each."""
    doc = inspect.cleandoc(value.__doc__ or "")
    module = getattr(value, "__module__", "") or ""
    if len(doc) < 20:
        yield f"{name}: has no docstring"
    elif inspect.isclass(value):
        yield from _class(name, value, doc)
    else:
        yield from _call(name, value, doc)
    whole = doc + ((sys.modules[module].__doc__ or "") if OP.match(module) else "")
    if MAPS.match(module) and value is not nf.nn.set_process_group:
        if not SHAPE.search(whole):
            yield f"{name}: names no shape such as (B, C, H, W)"
        if not FORMULA.search(whole):
            yield f"{name}: has no formula"
    if OP.match(module) and not inspect.isclass(value):
        if not DTYPE.search(whole):
            yield f"{name}: does not mention dtypes"
        if not PAPER.search(whole):
            yield f"{name}: names no source (paper, section, equation)"


def _class(name: str, value: Any, doc: str) -> Iterator[str]:
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    made = vars(value).get("__post_init__" if fields else "__init__")
    if getattr(value, "_is_protocol", False):
        made = None
    given = [field.name for field in fields if "help" not in field.metadata]
    if issubclass(value, tuple):
        given = list(value._fields)
    elif not fields and made is not None:
        given = _parameters(made)
    yield from _unnamed(name, given, doc)
    if _refuses(made) and "Raises" not in doc:
        yield f"{name}: raises errors that its docstring does not name (Raises)"
    for short, entry in () if issubclass(value, tuple) else vars(value).items():
        kind = type(entry).__name__
        attribute = {
            "property": "fget",
            "cached_property": "func",
            "classmethod": "__func__",
            "staticmethod": "__func__",
        }
        function = getattr(entry, attribute[kind]) if kind in attribute else entry
        if short.startswith("_") or not inspect.isfunction(function) or short == "extra_repr":
            continue
        if not function.__doc__:
            if short != "forward":  # the class says what it computes
                yield f"{name}.{short}: has no docstring"
        elif not kind.endswith("property"):
            yield from _call(f"{name}.{short}", function, function.__doc__, also=doc)


def _call(name: str, function: Any, doc: str, also: str = "") -> Iterator[str]:
    yield from _unnamed(name, _parameters(function), doc + also)
    if _refuses(function) and not re.search("Raises|[Ee]rrors? of", doc):
        yield f"{name}: raises errors that its docstring does not name (Raises)"


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def _unnamed(name: str, parameters: list[str], doc: str) -> Iterator[str]:
    for parameter in parameters:
        if not re.search(rf"(?<!\w){re.escape(parameter)}(?!\w)", doc):
            yield f"{name}: does not say what {parameter} is"


def _refuses(function: Any) -> bool:
    try:
        return bool(REFUSES.search(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))))
    except (TypeError, OSError):  # there is none, or dataclass made it
        return False


def test_every_docstring_holds_what_readers_need() -> None:
    found = [line for name, value in public().items() if callable(value) for line in broken(name, value)]
    assert not found


def test_the_reference_shows_every_public_module_and_the_formulas_of_every_operator() -> None:
    assert set(MODULES) == {
        "nvae_fast", *(f"nvae_fast.{name}" for name in ("nn", "distributions", "models.likelihoods", "training", "data")),
    }  # fmt: skip
    names = public()
    assert len(names) > 80
    operators = {
        value.__module__ for value in names.values() if OP.match(getattr(value, "__module__", None) or "")
    }
    assert operators <= set(SHOWN)


def test_constants_have_docstrings() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "nvae_fast").rglob("*.py"))
    for name, value in public().items():
        if not callable(value) and not inspect.ismodule(value):
            assert re.search(rf'^{name.rpartition(".")[2]}\b[^"]*=(?:.|\n(?!\n))*?\n"""\w', sources, re.M), (
                name
            )


def test_the_pages_of_the_site_are_there() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"^ +- ([\w/-]+\.md)$", site, re.M))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages


def test_make_docs_installs_what_the_extra_names() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^docs = \[(.*)\]", project, re.M)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = (line for line in makefile.splitlines() if "VENV_DOCS" in line and "pip install" in line)
    wanted = re.findall(r'"([^"]+)"', extra)
    assert wanted
    assert not [name for name in wanted if name not in line]
    assert re.search(
        r"^optional \.venv-docs docs\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M
    )


def test_a_docstring_that_lacks_something_is_found() -> None:
    def refuses(count: int, other: int = 0) -> None:
        """Takes a count and does something with it."""
        raise ValueError(count)

    def found(value: Any, doc: str | None = None) -> list[str]:
        if doc is not None:
            value.__doc__ = doc
        return [line.removeprefix("it: ") for line in broken("it", value)]

    raises = "raises errors that its docstring does not name (Raises)"
    assert found(refuses) == ["does not say what other is", raises]
    assert found(refuses, "") == ["has no docstring"]
    assert found(refuses, "Takes count, other. Raises ValueError, always.") == []

    class Thing:
        """A thing made of parts, of a certain size."""

        def __init__(self, parts: int) -> None:
            if parts < 0:
                raise ValueError(parts)

        def undocumented(self) -> None: ...

        @property
        def also_undocumented(self) -> int:
            return 0

    assert found(Thing) == [
        raises,
        "it.undocumented: has no docstring",
        "it.also_undocumented: has no docstring",
    ]


def test_a_docstring_of_an_operator_names_shapes_formula_dtypes_and_paper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op = nf.normal_log_prob
    assert list(broken("it", op)) == []
    monkeypatch.setattr(sys.modules[op.__module__], "__doc__", "Nothing.")
    monkeypatch.setattr(op, "__doc__", "Takes z, params, clamp, sigma_floor and returns something.")
    assert [line.removeprefix("it: ") for line in broken("it", op)] == [
        "raises errors that its docstring does not name (Raises)",
        "names no shape such as (B, C, H, W)",
        "has no formula",
        "does not mention dtypes",
        "names no source (paper, section, equation)",
    ]


def test_the_example_of_a_description_is_the_one_in_use() -> None:
    page = (ROOT / "docs" / "contributing-an-operator.md").read_text(encoding="utf-8")
    used = (ROOT / "tests" / "descriptions" / "elu.py").read_text(encoding="utf-8")
    (example,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "DESCRIPTIONS" in block
    )
    lines = {line.strip() for line in used.splitlines()}
    assert not [line for line in example.splitlines() if line.strip() not in lines | {""}]
