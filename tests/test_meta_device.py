"""Modules made on the meta device, or given new storage, and loaded afterwards equal the module that was saved."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import nvae_fast as nf

CONFIG = nf.NVAEConfig(
    dataset="cifar10", num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=1, num_nf=1, num_latent_per_group=3,
    num_preprocess_cells=1, num_postprocess_cells=1,
)  # fmt: skip


def original() -> nf.NVAE:
    torch.manual_seed(0)
    return nf.NVAE(CONFIG).eval()


def on_meta() -> nf.NVAE:
    with torch.device("meta"):
        model = nf.NVAE(CONFIG)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    return model


def emptied(model: nf.NVAE) -> nf.NVAE:
    """With storage of its own that holds anything."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "mask" not in n)):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
    return model


def loaded(model: nf.NVAE, **options: bool) -> nf.NVAE:
    model.load_state_dict(original().state_dict(), **options)
    return model.eval()


WAYS: dict[str, Callable[[], nf.NVAE]] = {
    "to_empty": lambda: loaded(emptied(on_meta())),
    "assign": lambda: loaded(on_meta(), assign=True),
    "to_empty of a module with values": lambda: loaded(emptied(original())),
    "to meta and back": lambda: loaded(emptied(original().to("meta"))),
    "a copy": lambda: loaded(emptied(copy.deepcopy(on_meta()))),
    "pickled": lambda: loaded(emptied(pickle.loads(pickle.dumps(on_meta())))),
    "twice": lambda: loaded(emptied(emptied(on_meta()).to("meta"))),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_loaded_model_is_the_saved_one(way: str) -> None:
    good, model = original(), WAYS[way]()
    expected = {**dict(good.named_parameters()), **dict(good.named_buffers())}
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x, seed=0).logits, good(x, seed=0).logits)


def test_a_mask_that_was_changed_moves_as_it_is() -> None:
    conv = nf.nn.WeightNormConv2d(2, 2, 3, mask=torch.ones(2, 2, 3, 3))
    conv.mask.data[:, :, 1:] = 0
    changed = conv.mask.clone()
    for move in (nn.Module.double, nn.Module.bfloat16, lambda c: c.to_empty(device="cpu")):
        move(conv)
        assert torch.equal(conv.mask.float(), changed)
        assert conv.mask.dtype == conv.weight.dtype


def test_a_model_on_meta_infers_shapes() -> None:
    out = on_meta()(
        torch.empty(2, 3, 32, 32, device="meta"), seed=torch.empty((), dtype=torch.int64, device="meta")
    )
    assert out.logits.shape == (2, 100, 32, 32)


def test_a_mask_without_values_is_refused() -> None:
    with torch.device("meta"):
        conv = nf.nn.WeightNormConv2d(2, 2, 3, mask=torch.ones(2, 2, 3, 3))
    with pytest.raises(RuntimeError, match="mask was made on the meta device and has no values"):
        conv.to_empty(device="cpu")
