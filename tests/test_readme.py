"""README and pages of docs/: their Python runs, their command lines are understood, the names they give are there."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
import torch

import nvae_fast as nf
from nvae_fast import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
}
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$",
    "\n".join(PAGES[ROOT / page] for page in ("README.md", "docs/kl.md", "docs/cell.md")),
    re.M | re.S,
)
COMMANDS = re.findall(
    r"^ +(?:torchrun\b.*)?(?:python )?-m nvae_fast (.*?)(?: +#.*)?$", "\n".join(PAGES.values()), re.M
)


def block(start: str) -> str:
    """The code block that begins so; README repeats one line of docs/kl.md."""
    return [text for text in BLOCKS if text.startswith(start)][-1]


def test_six_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    config = nf.NVAEConfig(
        dataset="cifar10", num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=2, num_latent_per_group=2,
        num_preprocess_blocks=1, num_preprocess_cells=1, num_postprocess_blocks=1, num_postprocess_cells=1,
    )  # fmt: skip
    nf.save_official(nf.NVAE(config), "official.pt")
    names: dict = {}
    exec(block("import torch, nvae_fast as nf"), names)
    assert names["elbo"].shape == (4,)
    assert names["pictures"].shape == (16, 3, 32, 32)


def test_one_line_instead_of_forty() -> None:
    packed = [torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    names: dict = {"torch": torch, "math": math, "posterior": packed[0], "prior": packed[1]}
    exec(block("clamp = lambda t"), names)
    one = nf.residual_normal(*packed, noise=names["eps"])
    for name, value in one._asdict().items():
        torch.testing.assert_close(value, names[name], rtol=1e-12, atol=1e-12)
        by_hand = torch.autograd.grad(names[name].sum(), packed, retain_graph=True)
        torch.testing.assert_close(
            torch.autograd.grad(value.sum(), packed, retain_graph=True), by_hand, rtol=1e-10, atol=1e-10
        )
    for line in (text for text in BLOCKS if text.startswith("out = nf.residual_normal(posterior, prior)")):
        exec(line, {**names, "nf": nf})


def test_the_cell_and_its_parts(one_thread: None) -> None:
    x = torch.randn(2, 128, 4, 4)
    cell: dict = {"nf": nf, "x": x}
    exec(block("cell = nf.nn.InvertedResidualCell"), cell)
    assert cell["y"].shape == x.shape
    parts = {
        **dict(nf=nf, x=x, skip=x, scale=torch.ones(128), shift=torch.zeros(128), bias=torch.zeros(128)),
        "weights_and_biases": [torch.zeros(8, 128), torch.zeros(8), torch.zeros(128, 8), torch.zeros(128)],
    }
    lines = block("y, statistics = nf.depthwise_conv2d").splitlines()
    for line, weight in zip(lines, (torch.ones(128, 1, 5, 5), torch.ones(128), None), strict=True):
        names = {**parts, "weight": weight}
        exec(line, names)
        assert names["y"].shape == x.shape, line


def test_models_built_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.SiLU())
    exec(block("model = nf.accelerate(model)"), {"nf": nf, "model": model})
    assert "1 parts replaced" in capsys.readouterr().out
    assert "forward" not in model.__dict__


def test_every_block_is_run_here() -> None:
    assert len(BLOCKS) == 7


def test_readme_is_short_and_its_pictures_are_small() -> None:
    assert len(README.splitlines()) <= 150
    assert 2 <= README.count("![") <= 3
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()) < 300_000


def test_lines_of_text_are_short() -> None:
    """Rows of tables cannot be broken into lines."""
    texts = {**PAGES, ROOT / "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
    assert not [
        f"{path.name}: {line}"
        for path, text in texts.items()
        for line in text.splitlines()
        if len(line) > 128 and not line.lstrip().startswith("|")
    ]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_is_understood(line: str) -> None:
    cli.parse(shlex.split(line))


def test_there_are_command_lines() -> None:
    assert {line.split()[0] for line in COMMANDS} >= {
        "train", "evaluate", "fid", "sample", "plot", "convert", "info", "prepare", "interpolate", "reconstruct",
    }  # fmt: skip


def test_make_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {name for text in PAGES.values() for name in re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M)}
    assert {"build", "demo", "test", "docs", "bench"} <= named
    assert not [name for name in named if not re.search(rf"^{name}:", makefile, re.M)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_links_lead_somewhere(page: Path) -> None:
    text = PAGES[page]
    for name in set(re.findall(r"\bnf\.((?:\w+\.)*\w+)", text)):
        value: object = nf
        for part in name.split("."):
            assert hasattr(value, part), f"nf.{name}"
            value = getattr(value, part)
    if page.name == "README.md":
        for method in set(re.findall(r"\bmodel\.(\w+)\(", text)):
            assert hasattr(nf.NVAE, method), f"model.{method}"
    for target, _, heading in re.findall(r"\]\((?!https?:)([\w./-]*)(#([\w-]+))?\)", text):
        found = page.parent / target if target else page
        assert found.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.M)
            assert heading in {title.lower().replace(" ", "-") for title in titles}, f"{target}#{heading}"
    for path in set(
        re.findall(r"`((?:nvae_fast|examples|tests|benchmarks|csrc|kernels)/[\w/]+\.\w+)`", text)
    ):
        assert (ROOT / path).is_file(), path
