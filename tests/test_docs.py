"""docs/api is what the docstrings say, and the docstrings say what the rules ask."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import nvae_fast as nf

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "docs"))

import generate  # noqa: E402
import public  # noqa: E402
import rules  # noqa: E402


@pytest.fixture(scope="module")
def names() -> dict[str, public.Name]:
    return public.names()


def test_every_public_name_has_a_page_that_is_up_to_date() -> None:
    stale = generate.out_of_date(generate.API, generate.pages())
    assert not stale, "run python docs/generate.py"


def test_every_docstring_holds_what_the_rules_ask(names: dict[str, public.Name]) -> None:
    assert not rules.broken(names)


def test_all_that_is_exported_is_there(names: dict[str, public.Name]) -> None:
    for module in public.MODULES:
        home = sys.modules[module]
        assert len(set(home.__all__)) == len(home.__all__)
        assert {name.short for name in names.values() if name.module == module} == set(home.__all__)
    made = generate.pages()
    assert set(made) == {"index.md", *(f"{full}.md" for full in names)}
    index = made["index.md"]
    assert not [full for full in names if f"({full}.md)" not in index]


def test_links_lead_somewhere() -> None:
    for page, text in generate.pages().items():
        targets = re.findall(r"\]\(([\w./]+\.(?:md|py))\)", text)
        assert targets
        for target in targets:
            assert (generate.API / target).resolve().exists(), (page, target)


def test_a_page_in_full(names: dict[str, public.Name]) -> None:
    page = generate.page(names["nvae_fast.normal_sample"], names)
    for part in (
        "# nvae_fast.normal_sample\n\n```python\nnvae_fast.normal_sample(\n    params: Tensor,\n    *,\n",
        "\n    seed: int | Tensor | None = None,\n",
        "\n) -> Tensor\n```\n",
        "**Args**\n\n- `params`: packed raw parameters (B, 2Z, H, W).\n",
        "- `clamp`, `sigma_floor`: as in [`nvae_fast.residual_normal`](nvae_fast.residual_normal.md).\n",
        "**Raises**\n\n- `TypeError`: ",
        "## Formulas\n\nSample a squashed normal: `z = mu + temperature * sigma * eps`",
    ):
        assert part in page


def test_a_page_that_is_missing_stale_or_left_over_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--out", str(tmp_path)]) == 0
    assert generate.main(["--check", "--out", str(tmp_path)]) == 0
    (tmp_path / "nvae_fast.NVAE.md").unlink()
    (tmp_path / "nvae_fast.gone.md").write_text("")
    index = tmp_path / "index.md"
    index.write_text(index.read_text() + "more\n")
    capsys.readouterr()
    assert generate.main(["--check", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "nvae_fast.NVAE.md: has no page; run python docs/generate.py",
        "nvae_fast.gone.md: is no public name any more; run python docs/generate.py",
        "index.md: is out of date; run python docs/generate.py",
    ]


def _found(value: object, **changes: str) -> list[str]:
    name = public.Name("nvae_fast", "thing", value, changes.get("doc", value.__doc__ or ""))
    return [line.removeprefix("nvae_fast.thing") for line in rules.broken({name.full: name})]


def test_the_rules_find_what_is_missing() -> None:
    def refuses(count: int, other: int = 0) -> None:
        """Takes a count and does something with it."""
        raise ValueError(count)

    assert _found(refuses) == [
        ": does not say what other is",
        ": raises errors that its docstring does not name (Raises)",
    ]
    assert _found(refuses, doc="") == [": has no docstring worth the name"]
    assert _found(refuses, doc="Takes count, other. Raises ValueError, always.") == []

    op = nf.normal_log_prob
    assert _found(op) == []
    module = sys.modules[op.__module__]
    whole = module.__doc__
    try:
        module.__doc__ = "Nothing."
        assert _found(op, doc="Takes z, params, clamp, sigma_floor and returns something.") == [
            ": raises errors that its docstring does not name (Raises)",
            ": names no shape such as (B, C, H, W)",
            ": has no formula",
            ": says nothing about dtypes",
            ": names no source (paper, section, equation)",
        ]
    finally:
        module.__doc__ = whole

    class Thing:
        """A thing made of parts, of a certain size."""

        def __init__(self, parts: int) -> None:
            if parts < 0:
                raise ValueError(parts)

        def undocumented(self) -> None: ...

        @property
        def also_undocumented(self) -> int:
            return 0

    assert _found(Thing) == [
        ".undocumented: has no docstring",
        ".also_undocumented: has no docstring",
    ]
    Thing.__module__ = Thing.__init__.__module__ = "nvae_fast.invented"
    assert ": raises errors that its docstring does not name (Raises)" in _found(Thing)


def test_the_example_of_a_description_is_the_one_in_use() -> None:
    page = (ROOT / "docs" / "contributing-an-operator.md").read_text(encoding="utf-8")
    used = (ROOT / "tests" / "descriptions" / "elu.py").read_text(encoding="utf-8")
    (example,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "DESCRIPTIONS" in block
    )
    lines = {line.strip() for line in used.splitlines()}
    assert not [line for line in example.splitlines() if line.strip() not in lines | {""}]
