"""The examples run, and show what they say."""

from __future__ import annotations

import importlib.util
import re
import struct
from pathlib import Path
from types import ModuleType

import pytest
import torch
import training_runs

import nvae_fast as nf

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def size_of(picture: Path) -> tuple[int, int]:
    """(height, width) in a PNG's header."""
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    return height, width


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    assert len(EXAMPLES) == 3
    assert not [path.stem for path in EXAMPLES if f'example("{path.stem}")' not in text]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_explains_itself(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example(path.stem)
    assert f"python examples/{path.name}" in module.__doc__
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    assert "default" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) < 150


def test_the_training_loop_with_and_without_the_line(
    capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    module = example("accelerate_training_loop")
    tiny = ["--steps", "4", "--batch-size", "8", "--channels", "8", "--blocks", "1"]
    module.main(tiny)
    fast = capsys.readouterr().out
    assert fast.startswith("6 parts replaced, 0 left")
    module.main([*tiny, "--plain"])
    plain = capsys.readouterr().out
    losses = [float(re.search(r"step 4: ([\d.]+) nats", out)[1]) for out in (fast, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    "changes", [{}, {"num_groups_per_scale": 1}, {"num_nf": 1}], ids=["towers", "vanilla", "flows"]
)
def test_what_enters_the_decoder_is_what_was_encoded(changes: dict[str, int]) -> None:
    module = example("interpolate")
    model = training_runs.tiny_model(**changes).eval()
    x = torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        latents = module.encode(model, x)
        out = model(x, noise=[torch.zeros(3, *shape) for shape in model.config.z_shapes])
        assert [tuple(z.shape[1:]) for z in latents] == model.config.z_shapes
        again = module.decode(model, latents)
        torch.testing.assert_close(again, model.likelihood(out.logits).mean(), rtol=1e-4, atol=1e-5)
        moved = module.decode(model, [z + 1 for z in latents])
        assert (moved - again).abs().max() > 1e-4
    assert not [part for part in model.modules() if part._forward_pre_hooks]


def test_pictures_from_a_checkpoint(
    tmp_path: Path, digits: nf.data.ImageDataset, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    module = example("interpolate")
    config = training_runs.TINY_TRAINING.replace(max_steps=2)
    (tmp_path / "run").mkdir()
    model = training_runs.tiny_model()
    nf.training.Trainer(model, config, digits, tmp_path / "run", quiet=True, data=("digits", None)).run()
    out = tmp_path / "pictures"
    module.main([str(tmp_path / "run"), "--out", str(out), "--pairs", "2", "--steps", "3"])
    assert capsys.readouterr().out.count("wrote ") == 2
    side = 32 + 2
    for name, (rows, columns) in {"reconstructions": (2, 4), "interpolations": (2, 5)}.items():
        assert size_of(out / f"{name}.png") == (rows * side - 2, columns * side - 2)


def test_an_own_model_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    module = example("own_hierarchical_vae")
    out = tmp_path / "samples.png"
    module.main(["--steps", "12", "--batch-size", "16", "--width", "8", "--out", str(out)])
    told = capsys.readouterr().out
    assert re.search(
        r"^step 12: negative bound [\d.]+ nats an image, KL of the groups [\d.]+, [\d.]+, [\d.]+$", told, re.M
    )
    assert size_of(out) == (8 * 34 - 2, 8 * 34 - 2)

    torch.manual_seed(0)
    model = module.HierarchicalVAE(8)
    x = torch.rand(2, 1, 32, 32)
    logits, kl = model(x)
    assert logits.shape == x.shape
    assert kl.shape == (2, 3)
    assert (kl >= 0).all()
    (logits.sum() + kl.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
