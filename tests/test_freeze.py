"""``nf.freeze``: the numbers of the module in evaluation mode, from a copy that is on its own and cannot be trained."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_close
from torch import nn
from torch.nn.utils import parametrize, prune
from training_runs import tiny_model

import nvae_fast as nf

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "flows": {"dataset": "photos", "num_nf": 1},
    "normal": {"dataset": "photos", "num_mixture_dec": 1},
    "elu": {"arch_instance": "res_elu"},
    "grouped": {"arch_instance": "mbconv_den", "num_channels_enc": 8, "num_channels_dec": 8},
    "vanilla": {"num_latent_scales": 1, "num_groups_per_scale": 1},
    "without gate": {"use_se": False},
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def trained(**changes: Any) -> nf.NVAE:
    """A small model with running statistics and batch norm weights of its own, in evaluation mode."""
    model = tiny_model(**changes).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nf.nn.BatchNormSwish)):
            norm.weight.uniform_(-1.5, 1.5, generator=generator)
            norm.bias.uniform_(-1, 1, generator=generator)
        for _ in range(3):
            model(images(model, 4), seed=1)
    return model.eval()


def images(model: nf.NVAE, n: int = 2) -> torch.Tensor:
    c = model.config
    return torch.rand(
        n, c.channels, c.resolution, c.resolution, generator=torch.Generator().manual_seed(3)
    ).round()


@torch.no_grad()
def numbers(model: Any, n: int = 2) -> list[torch.Tensor]:
    out = model(images(model, n), seed=1)
    return [out.logits, out.kl, out.log_q, out.log_p, model.sample(n, 0.7, seed=2)]


def assert_same(actual: Any, expected: Any, tolerance: float = 2e-6) -> None:
    for a, e in zip(numbers(actual), numbers(expected), strict=True):
        assert a.dtype == e.dtype
        assert_close(a, e, tolerance)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("changes", MODELS)
def test_a_frozen_model_gives_the_numbers_of_evaluation(changes: str, memory_format: str) -> None:
    model = trained(**MODELS[changes]).to(memory_format=FORMATS[memory_format])
    frozen = nf.freeze(model)
    with nf.use_backend("reference"):
        reference = copy.deepcopy(model)
        expected = numbers(reference)
        plain = numbers(frozen)
    for a, p, e in zip(numbers(frozen), plain, expected, strict=True):
        assert_close(a, e, 2e-6, "kernels")
        assert_close(p, e, 2e-6, "reference")


@pytest.mark.parametrize("changes", ["default", "flows"])
def test_double_and_half_precision(changes: str) -> None:
    model = trained(**MODELS[changes])
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = numbers(model), numbers(nf.freeze(model))
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == e.dtype
        assert_close(a.float(), e.float(), 3e-2)
    wide = copy.deepcopy(model).double()
    x = images(model).double()
    with torch.no_grad():
        noise = [torch.randn(2, *shape, dtype=torch.float64) for shape in model.config.z_shapes]
        assert_close(nf.freeze(wide)(x, noise=noise).logits, wide(x, noise=noise).logits, 1e-12)
        assert_close(nf.freeze(model).double()(x, noise=noise).logits, wide(x, noise=noise).logits, 1e-6)


@pytest.mark.parametrize(
    "module, channels",
    [
        (lambda: nf.nn.InvertedResidualCell(8, 8, 6, 5, squeeze_excite=True), 8),
        (lambda: nf.nn.InvertedResidualCell(8, 16, 3, 5, stride=2), 8),
        (lambda: nf.nn.InvertedResidualCell(8, 4, 6, 5, stride=-1, squeeze_excite=True), 8),
        (lambda: nf.nn.InvertedResidual(8, 8, expansion=3, kernel_size=3), 8),
        (lambda: nf.nn.ConvBlock(8, 4, 2), 8),
        (lambda: nf.nn.BatchNormSwish(8), 8),
        (lambda: nf.nn.BatchNormSwish(8, None), 8),
        (lambda: nf.nn.WeightNormConv2d(8, 4, 3), 8),
        (lambda: nf.nn.WeightNormConv2d(8, 4, 1, bias=False), 8),
        (lambda: nf.nn.SkipUp(8, 4), 8),
        (lambda: nf.nn.FlowCell(3), 3),
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nf.nn.ConvBlock(8, 8)), 8),
    ],
)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_any_module_of_our_parts(module: Callable[[], nn.Module], channels: int, memory_format: str) -> None:
    own = module().to(memory_format=FORMATS[memory_format])
    x = torch.randn(2, channels, 8, 6).contiguous(memory_format=FORMATS[memory_format])
    for _ in range(2):
        own(x)
    own.eval()
    frozen = nf.freeze(own)
    with torch.no_grad(), nf.use_backend("reference"):
        expected = own(x)
    assert_close(frozen(x), expected, 2e-6)
    assert not list(frozen.parameters())


def test_later_changes_do_not_reach_it_and_the_original_is_untouched() -> None:
    model = trained()
    model.train()
    model.eval()
    before = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    frozen = nf.freeze(model)
    expected = numbers(frozen)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(p.requires_grad for p in model.parameters())
    owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not owned & {t.untyped_storage().data_ptr() for t in frozen.buffers()}
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            t.data.zero_()
    for a, e in zip(numbers(frozen), expected, strict=True):
        assert torch.equal(a, e)


def test_a_model_in_training_mode_stays_there() -> None:
    model = trained().train()
    frozen = nf.freeze(model)
    assert model.training
    assert not any(part.training for part in frozen.modules())
    assert_same(frozen, model.eval())


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "frozen again"])
def test_copies(copied: str) -> None:
    frozen = nf.freeze(trained(dataset="photos", num_nf=1))
    numbers(frozen)  # what is derived from the buffers exists by now
    if copied == "deepcopy":
        twin = copy.deepcopy(frozen)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(frozen))
    elif copied == "torch.save":
        file = io.BytesIO()
        torch.save(frozen, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = nf.freeze(frozen)
    for a, e in zip(numbers(twin), numbers(frozen), strict=True):
        assert torch.equal(a, e)
    with pytest.raises(RuntimeError, match="frozen"):
        twin.train()


def test_moving_it_drops_what_was_derived() -> None:
    frozen = nf.freeze(trained())
    numbers(frozen)
    assert (
        frozen.to("meta").sample(2, seed=torch.zeros((), dtype=torch.int64, device="meta")).device.type
        == "meta"
    )
    twice = nf.freeze(trained())
    numbers(twice)
    twice.double().float()
    assert_same(twice, trained())


def test_what_a_frozen_model_refuses() -> None:
    model = trained()
    frozen: Any = nf.freeze(model)
    refused: dict[str, Callable[[], Any]] = {
        "NVAE.train": frozen.train,
        "NVAE.regularization": frozen.regularization,
        "NVAE.readjust_batch_norm": lambda: frozen.readjust_batch_norm(1.0, passes=1),
        "load_state_dict": lambda: frozen.load_state_dict(model.state_dict()),
        "NVAE.official_state_dict": frozen.official_state_dict,
        "NVAE.load_official_state_dict": lambda: frozen.load_official_state_dict({}),
        "x requires gradients": lambda: frozen(images(model).requires_grad_()),
    }
    for what, call in refused.items():
        with pytest.raises(RuntimeError, match=f"{what}: the module is frozen, an inference-only copy"):
            call()
    assert frozen.eval() is frozen
    with pytest.raises(RuntimeError, match="train: the module is frozen"):
        nf.freeze(nn.Sequential(nf.nn.ConvBlock(4, 4))).train()
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.Adamax(frozen.parameters())
    with pytest.raises(TypeError, match=r"freeze: module must be a torch\.nn\.Module, got int"):
        nf.freeze(3)  # type: ignore[arg-type]
    with torch.no_grad():
        frozen(images(model).requires_grad_())


def test_parts_that_are_not_plain_compute_themselves() -> None:
    model = trained()
    convolutions = [m for m in model.modules() if isinstance(m, nf.nn.WeightNormConv2d)]
    inner = next(m for m in model.modules() if isinstance(m, nf.nn.InvertedResidual))
    calls = []
    convolutions[0].register_forward_hook(lambda module, args, y: calls.append(module) or 2 * y)
    inner.expand.register_forward_hook(lambda module, args, y: 0.5 * y)
    prune.l1_unstructured(convolutions[3], "weight", 0.5)

    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    parametrize.register_parametrization(convolutions[2], "log_weight_norm", Half())
    assert_same(nf.freeze(model), model)
    assert len(calls) == 2


def test_shared_parts_stay_shared() -> None:
    shared = nf.nn.WeightNormConv2d(4, 4, 3)
    frozen: Any = nf.freeze(nn.Sequential(shared, nn.Identity(), shared))
    assert frozen[0] is frozen[2]


def test_process_groups_are_left_out() -> None:
    class Group:
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot be copied")

    model = nf.nn.set_process_group(nn.Sequential(nf.nn.ConvBlock(4, 4)), Group())
    nf.freeze(model)


@pytest.mark.parametrize("changes", ["default", "flows"])
def test_compiled_in_one_graph(changes: str) -> None:
    frozen: Any = nf.freeze(trained(**MODELS[changes]))
    cell = next(m for m in frozen.modules() if type(m).__name__ == "FrozenResidualCell")
    x = torch.randn(2, cell.expand.shape[1], 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), cell(x), 2e-6)
    conv = next(m for m in frozen.modules() if type(m).__name__ == "FrozenConv2d")
    x = torch.randn(2, conv.weight.shape[1], 8, 8)
    assert_close(torch.compile(conv, fullgraph=True, backend="aot_eager")(x), conv(x), 2e-6)
    torch._dynamo.reset()


def test_a_compiled_module_is_frozen_without_its_wrapper() -> None:
    model = trained()
    assert_same(nf.freeze(torch.compile(model)), model)


def test_a_state_that_holds_tensors_only() -> None:
    assert all(isinstance(value, torch.Tensor) for value in nf.freeze(trained()).state_dict().values())


def test_a_frozen_cell_is_a_handful_of_calls() -> None:
    """Calls of this package's Python functions, and how often they move to another file."""
    cell = nf.freeze(nf.nn.InvertedResidualCell(8, 8, 6, 5, squeeze_excite=True))
    x = torch.randn(2, 8, 6, 6)
    cell(x)
    package = str(Path(nf.__file__).parent)
    files: list[str] = []

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            files.append(frame.f_code.co_filename)

    sys.setprofile(count)
    try:
        cell(x)
    finally:
        sys.setprofile(None)
    assert len(files) <= 5
    assert sum(a != b for a, b in itertools.pairwise(files)) <= 3
