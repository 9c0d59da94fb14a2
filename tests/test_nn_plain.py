"""Layers with hooks, pruning, parametrisations or a forward of their own compute themselves, where operators replace them."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_close
from torch import nn
from torch.nn.utils import parametrize, prune

import nvae_fast as nf
from nvae_fast.nn.plain import is_plain

CONFIG = nf.NVAEConfig(
    dataset="digits", num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=1, num_nf=1, num_latent_per_group=2,
    num_preprocess_cells=1, num_postprocess_cells=1,
)  # fmt: skip
LAYERS: dict[str, tuple[type, ...]] = {
    "weight norm": (nf.nn.WeightNormConv2d,),
    "plain": (nf.nn.PlainConv2d,),
    "linear": (nn.Linear,),
    "batch norm": (nf.nn.BatchNormSwish,),
}


def model(**more: Any) -> nf.NVAE:
    torch.manual_seed(0)
    made = nf.NVAE(nf.NVAEConfig(**{**CONFIG.__dict__, **more})).double().eval()
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, nf.nn.BatchNormSwish):
                part.running_mean.normal_(0, 0.1)
                part.bias.normal_(0, 0.1)
    return made


def images() -> torch.Tensor:
    return torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round()


def result(module: nn.Module) -> torch.Tensor:
    out = module(images(), seed=3)
    return torch.cat([out.logits.flatten(), out.kl.flatten()])


def parts(module: nn.Module, kinds: tuple[type, ...]) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, kinds)]


@pytest.mark.parametrize("arch", ["res_mbconv", "mbconv_sep", "res_elu"])
def test_hooks_of_every_layer_run(arch: str) -> None:
    plain, hooked, seen = model(arch_instance=arch), model(arch_instance=arch), set()
    for name, part in hooked.named_modules():
        part.register_forward_hook(lambda *args, name=name: seen.add(name))
    assert_close(result(hooked), result(plain), 1e-10)
    never = {"", "spectral", "preprocess", "encoder", "posterior", "prior", "flows", "decoder", "postprocess"}
    expected = {
        name
        for name, part in hooked.named_modules()
        if name not in never and not isinstance(part, (nn.ModuleList, nn.Identity))
    }
    assert expected - seen == set()


def test_hooks_for_all_modules_see_the_inner_layers() -> None:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(module))
    try:
        made = model()
        result(made)
    finally:
        handle.remove()
    assert set(parts(made, (nn.Linear, nn.Conv2d, nf.nn.WeightNormConv2d))) <= set(seen)


@pytest.mark.parametrize("which", LAYERS)
def test_what_a_hook_changes_is_used(which: str) -> None:
    """The hook doubles what the layer gives; so does a copy of the model whose layers are replaced by a wrapper."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    hooked, wrapped = model(), model()
    for part in parts(hooked, LAYERS[which]):
        part.register_forward_hook(lambda module, args, output: 2 * output)
    for parent in list(wrapped.modules()):
        for child in list(parent.children()):
            if isinstance(child, LAYERS[which]):
                # InvertedResidual asks the layers themselves for their attributes.
                child.forward = Doubled(copy.copy(child)).forward
    difference = result(hooked) - result(model())
    assert difference.abs().max() > 1e-3
    assert_close(result(hooked), result(wrapped), 1e-10)


@pytest.mark.parametrize("which", LAYERS)
def test_pruned_layers_train_and_use_their_masks(which: str) -> None:
    pruned = model().train()
    for part in parts(pruned, LAYERS[which]):
        prune.l1_unstructured(part, "weight", 0.3)
    removed = copy.deepcopy(model()).train()
    for part in parts(removed, LAYERS[which]):
        prune.l1_unstructured(part, "weight", 0.3)
        prune.remove(part, "weight")
    for _ in range(2):
        for made in (pruned, removed):
            made.zero_grad()
            out = made(images(), seed=3)
            (out.kl.sum() + out.logits.square().sum() + sum(made.regularization())).backward()
    wanted = parts(removed, LAYERS[which])
    for part, plain in zip(parts(pruned, LAYERS[which]), wanted, strict=True):
        grad = plain.weight.grad * part.weight_mask
        assert_close(part.weight_orig.grad, grad, 1e-6 if grad.norm() > 1e-9 else 1.0)
    assert_close(result(pruned.eval()), result(removed.eval()), 1e-10)


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
    "weight norm of PyTorch": lambda layer: nn.utils.weight_norm(layer) if layer.weight.dim() > 1 else None,
    "hook": lambda layer: layer.register_forward_hook(_twice),
    "own forward": lambda layer: setattr(layer, "forward", _Halving(layer)),
}


def _twice(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


class _Halving:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return type(self.layer).forward(self.layer, x) / 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
def test_frozen_models_keep_what_was_changed(change: str, which: str) -> None:
    made = model()
    for part in parts(made, LAYERS[which]):
        CHANGES[change](part)
    with torch.no_grad():
        expected = result(made)
        assert_close(result(nf.freeze(made)), expected, 1e-9)
        if change != "weight norm of PyTorch":
            assert not torch.allclose(expected, result(model()), rtol=1e-6)


def test_a_hook_on_a_module_may_write_the_weights_inside_it() -> None:
    """Without moving a version counter, as a library that loads weights just in time does."""
    made, expected = model(), model()
    inside = next(part for part in made.modules() if isinstance(part, nf.nn.SkipDown))
    with torch.no_grad():
        for conv in next(p for p in expected.modules() if isinstance(p, nf.nn.SkipDown)).convs:
            conv.weight[:, 0] *= -2

    def write(*args: Any) -> None:
        for conv in inside.convs:
            conv.weight.data[:, 0].mul_(-2)

    inside.register_forward_pre_hook(write)
    assert_close(result(made), result(expected), 1e-12)


def test_what_is_plain() -> None:
    linear = nn.Linear(2, 2)
    assert is_plain(linear, nf.nn.WeightNormConv2d(2, 2, 1, bias=False))
    for change in CHANGES.values():
        changed = nn.Linear(2, 2)
        change(changed)
        assert not is_plain(linear, changed)
    detached = nn.Linear(2, 2)
    del detached.weight
    detached.weight = torch.ones(2, 2)
    assert not is_plain(detached)


def test_a_cell_in_training_is_a_handful_of_calls() -> None:
    """Calls of Python functions of this package, and how often they move to another file."""
    if nf.backends()["inverted_residual_cell"]["cpu"] != "cpp":
        pytest.skip("the kernels are not in use")
    cell = nf.nn.InvertedResidualCell(8, 8, 6, 5, squeeze_excite=True)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
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
    assert len(files) <= 32
    moves = [a for a, b in itertools.pairwise(files) if a != b]
    assert len(moves) <= 13, moves
