"""Every operator, the inner passes and backward kernels too, as it is really called: PyTorch's own checks of its schema and of
its fake (shapes, dtypes, strides), on the arguments that a model, its regularisers and the optimizer give it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from internals import EXTENSION
from recording import Call, Recorder
from torch.utils._pytree import tree_map_only

import nvae_fast as nf
from nvae_fast.ops import winograd
from nvae_fast.ops.inverted_residual.train import NAME as CELL
from nvae_fast.ops.plane_affine import plane_affine
from nvae_fast.training.adamax import Adamax

pytestmark = pytest.mark.usefixtures("one_thread")


def cells(layout: torch.memory_format) -> None:
    for stride, c_out, se in ((1, 4, True), (2, 8, False), (-1, 4, True)):
        cell = nf.nn.InvertedResidualCell(4, c_out, 3, 5, stride, squeeze_excite=se)
        x = torch.randn(2, 4, 6, 6).contiguous(memory_format=layout).requires_grad_()
        cell(x).square().sum().backward()
        with torch.no_grad():
            cell.eval()(x)


def a_model() -> None:
    config = nf.NVAEConfig(
        dataset="custom", image_size=8, image_channels=3, likelihood="mixture_logistic", num_mixture_dec=2,
        num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=2, num_latent_per_group=2, num_nf=1,
        num_preprocess_blocks=1, num_preprocess_cells=1, num_postprocess_blocks=1, num_postprocess_cells=1,
    )  # fmt: skip
    model, x = nf.NVAE(config), torch.rand(2, 3, 8, 8)
    out = model(x)
    loss = model.reconstruction_loss(out.logits, x).sum() + out.kl.sum() + sum(model.regularization())
    loss.backward()
    optimizer = Adamax(model.parameters(), lr=1e-3, foreach=True)
    optimizer.step()
    logits = model.eval().sample(2, seed=1)
    model.likelihood(logits).sample(seed=2)
    model.likelihood(logits).mean()


def composed() -> None:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    nf.normal_sample(x).sum().backward()
    nf.weight_norm(torch.ones(2, 2, 3, 3, requires_grad=True), torch.zeros(2, 1, 1, 1)).sum().backward()
    nf.batch_norm_swish(x, torch.ones(4), torch.zeros(4)).y.sum().backward()
    plane_affine(x, torch.ones(2, 4, requires_grad=True)).sum().backward()
    # Called between processes and on a GPU; on a CPU alone C++ calls its body.
    channels = [torch.rand(4) for _ in range(5)]
    # 3x3 convolutions of more channels than the model has.
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    winograd.conv2d(x, torch.randn(3, 4, 3, 3, requires_grad=True), torch.randn(3)).sum().backward()
    winograd.weights(torch.randn(3, 4, 3, 3))
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = [torch.randn(2, 4, 3, 3).contiguous(memory_format=layout) for _ in range(2)]
        torch.ops.nvae_fast.affine_activation_grad(*maps, *channels, "swish")


WORK: tuple[Callable[[], None], ...] = (
    lambda: cells(torch.contiguous_format),
    lambda: cells(torch.channels_last),
    a_model,
    composed,
)


@pytest.fixture(scope="module")
def calls() -> dict[str, dict[str, Call]]:
    if nf.backends()[CELL]["cpu"] != "cpp":
        pytest.skip(EXTENSION.get("reason") or "the kernels are not in use")
    torch.manual_seed(0)
    with Recorder() as recorder:
        for work in WORK:
            work()
    return recorder.calls


def names() -> list[str]:
    schemas = (schema.name for schema in torch._C._jit_get_all_schemas())
    return sorted({n.removeprefix("nvae_fast::") for n in schemas if n.startswith("nvae_fast::")})


# Called nowhere in that work: words and draws of their own, which tests/test_philox.py checks.
ELSEWHERE = {"philox_normal", "philox_words"}


@pytest.mark.parametrize("name", [n for n in names() if n not in ELSEWHERE])
def test_schema_and_fake(name: str, calls: dict[str, dict[str, Call]]) -> None:
    found = calls.get(name, {})
    assert found, f"{name} is called by nothing here: let some work above call it"
    for operator, args in found.values():
        plain = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        torch.library.opcheck(operator, plain, test_utils=("test_schema", "test_faketensor"))
