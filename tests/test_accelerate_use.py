"""What people do to accelerated models: autocast, other dtypes, frozen parts, checkpointing, sharing, wrapping, other hooks."""

from __future__ import annotations

import copy
import multiprocessing
import weakref
from typing import Any

import pytest
import torch
from foreign_cells import accelerated, assert_same, make, observe, of_layers, plain_layers
from foreign_model import SE, Cell, Conv2D, InvertedResidual, SyncBatchNormSwish, Tower, local
from harness import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

import nvae_fast as nf
from nvae_fast.patching.clone import clone

SHAPE = (2, 12, 8, 6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2, -1])
def test_autocast(training: bool, stride: int) -> None:
    theirs = make(stride, se=stride != -1).train(training)
    ours, x = accelerated(theirs), torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, 2e-2)
    actual.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_other_dtypes_after_acceleration(dtype: torch.dtype, training: bool) -> None:
    theirs = make()
    ours = accelerated(theirs).to(dtype).train(training)
    theirs = theirs.to(dtype).train(training)
    x = torch.randn(SHAPE, dtype=dtype)
    actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype == dtype
    assert_close(actual, expected, 3e-2 if dtype == torch.bfloat16 else 1e-10)


@pytest.mark.parametrize("which", ["input", "convolutions", "batch norms"])
def test_dtypes_that_do_not_fit_raise_as_before(which: str) -> None:
    theirs = of_layers(*plain_layers())
    ours = accelerated(theirs)
    x = torch.randn(SHAPE, dtype=torch.float64 if which == "input" else torch.float32)
    kind = {"input": SE, "convolutions": nn.Conv2d, "batch norms": nn.BatchNorm2d}[which]
    messages = []
    for cell in (theirs, ours):
        for part in cell.modules():
            if isinstance(part, kind):
                part.to(torch.bfloat16)
        with pytest.raises(RuntimeError) as caught:
            cell(x)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("shape", [(0, 12, 8, 6), (12, 8, 6), (1, 12, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_inputs_that_kernels_do_not_take(shape: tuple[int, ...], training: bool) -> None:
    """The same result or the same error: empty, unbatched, one value per channel."""
    theirs = make(se=False).train(training)
    ours, x = accelerated(theirs), torch.randn(shape)
    found: list[Any] = []
    for cell in (theirs, ours):
        try:
            found.append(cell(x))
        except (ValueError, RuntimeError) as error:
            found.append((type(error), str(error)))
    if isinstance(found[0], torch.Tensor):
        assert_close(found[1], found[0], 2e-5)
    else:
        assert found[0] == found[1]
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_frozen_parameters() -> None:
    theirs = make()
    for name, p in theirs.named_parameters():
        p.requires_grad_("conv.3" in name)
    ours = accelerated(theirs)
    assert_same(ours, theirs, torch.randn(SHAPE))
    assert all((p.grad is None) != p.requires_grad for p in ours.parameters())


def test_all_batch_norms_frozen_inside_a_training_model() -> None:
    theirs = make()
    for part in theirs.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    ours = accelerated(theirs)
    assert ours.training
    assert_same(ours, theirs, torch.randn(SHAPE))


@pytest.mark.parametrize("part", ["cell", "batch norm", "gate", "depthwise"])
def test_double_backward_says_what_to_do(part: str) -> None:
    conv = nn.Conv2d(12, 12, 3, padding=1, groups=12)
    parts = {
        "cell": make,
        "batch norm": lambda: SyncBatchNormSwish(12),
        "gate": lambda: SE(12),
        "depthwise": lambda: conv,
    }
    module, x = parts[part](), torch.randn(SHAPE, requires_grad=True)
    nf.accelerate(module)
    with pytest.raises(
        RuntimeError, match=r"double backward is not supported; use nvae_fast.use_backend\('reference'\)"
    ):
        torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with nf.use_backend("reference"):
        (slope,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), x)
    assert second.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    theirs = make()
    ours, twin, x = accelerated(theirs), clone(theirs), torch.randn(SHAPE)
    actual = observe(lambda_module(ours, lambda x: checkpoint(ours, x, use_reentrant=reentrant)), x)
    expected = observe(lambda_module(twin, lambda x: checkpoint(twin, x, use_reentrant=reentrant)), x)
    for name in ("y", "grad x", "gradients"):
        assert_close(actual[name], expected[name], 2e-5, name)


def lambda_module(inner: nn.Module, forward: Any) -> nn.Module:
    outer = nn.Sequential(inner)
    outer.forward = forward
    return outer


def test_one_cell_called_twice_and_shared_parts() -> None:
    first, second = make(se=False), make(se=False)
    second._ops[0].conv[1] = first._ops[0].conv[1]
    theirs = nn.Sequential(first, second, first)
    ours = nf.accelerate(clone(theirs))
    kinds = [kind for _, kind in nf.acceleration_report(ours).replaced]
    assert kinds.count("whole inverted residual cell") == 2
    assert ours[0] is ours[2]
    assert ours[1]._ops[0].conv[1] is ours[0]._ops[0].conv[1]
    assert_same(ours, theirs, torch.randn(SHAPE), 1e-4)
    nf.restore(ours)
    assert all("forward" not in part.__dict__ for part in ours.modules())


def test_a_module_inside_itself_twice_in_the_names() -> None:
    """named_modules lists a shared module once, so that it is replaced, listed and restored once."""
    norm = SyncBatchNormSwish(12)
    model = nf.accelerate(nn.ModuleDict({"a": norm, "b": norm}))
    assert nf.acceleration_report(model).replaced == [("a", "batch norm + swish")]
    nf.restore(model)
    assert "forward" not in norm.__dict__


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrizations_and_old_weight_norm() -> None:
    def conv() -> nn.Conv2d:
        torch.manual_seed(5)
        return nn.Conv2d(12, 12, 3, padding=1, groups=12)

    for wrap in (
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    ):
        theirs, ours = wrap(conv()), nf.accelerate(wrap(conv()))
        ours.load_state_dict(theirs.state_dict())
        assert_same(ours, theirs, torch.randn(SHAPE))
        before, after = wrap(conv()), wrap(nf.accelerate(conv()))  # wrapped later
        after.load_state_dict(before.state_dict())
        assert_same(after, before, torch.randn(SHAPE))


def test_switching_statistics_off_later() -> None:
    for make_part in (lambda: SyncBatchNormSwish(12), lambda: nn.Sequential(nn.BatchNorm2d(12), nn.SiLU())):
        theirs, ours = make_part(), nf.accelerate(make_part())
        assert nf.acceleration_report(ours).replaced
        for part in (*theirs.modules(), *ours.modules()):
            if isinstance(part, nn.BatchNorm2d):
                part.track_running_stats = False
        assert_same(ours, theirs, torch.randn(SHAPE))


def test_hooks_on_the_cell_itself_do_not_slow_it() -> None:
    ours, x = accelerated(make()), torch.randn(SHAPE)
    seen: list[Any] = []
    ours.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    ours(x)
    assert seen == [x.shape]
    assert "" not in dict(nf.acceleration_report(ours).notes)


def test_functional_call_and_swapped_parameters() -> None:
    theirs = of_layers(*plain_layers()).eval()
    ours, x = accelerated(theirs), torch.randn(SHAPE)
    other = {name: p.detach() + 0.1 for name, p in theirs.named_parameters()}
    with torch.no_grad():
        ours(x)
        actual = torch.func.functional_call(ours, other, (x,))
        assert_close(actual, torch.func.functional_call(theirs, other, (x,)), 2e-5)
        for p, q in zip(
            ours.parameters(), theirs.parameters(), strict=True
        ):  # as code of that age swaps averages in
            p.data, q.data = p.data * 2, q.data * 2
        assert_close(ours(x), theirs(x), 2e-5)


def test_distributed_data_parallel_wraps_it(tmp_path: Any) -> None:
    theirs = local(make())
    ours = accelerated(theirs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours)
        x = torch.randn(SHAPE)
        assert_close(wrapped(x), theirs(x), 2e-5)
        wrapped(x).sum().backward()
        assert all(p.grad is not None for p in ours.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_is_kept_alive() -> None:
    """An accelerated model ends with its last reference (after a collection: a forward and its module hold each other)."""
    import gc

    model = nf.accelerate(nn.Sequential(make(), Conv2D(12, 4, 3, padding=1, bias=True)))
    model(torch.randn(SHAPE))
    ends = [weakref.ref(part) for part in model.modules()]
    del model
    gc.collect()
    assert not [end for end in ends if end() is not None]


def in_child(model: nn.Module, x: torch.Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(x).numpy())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_after_a_fork() -> None:
    context = multiprocessing.get_context("fork")
    model, x = nf.accelerate(Tower(8)).eval(), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    queue = context.Queue()
    child = context.Process(target=in_child, args=(model, x, queue))
    child.start()
    assert_close(torch.from_numpy(queue.get(timeout=60)), expected, 1e-6)
    child.join()


def test_state_dict_is_untouched_and_loads_both_ways() -> None:
    theirs, ours = make(), make()
    nf.accelerate(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(1.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert_close(ours.eval()(x), theirs.eval()(x), 2e-5)


def test_the_report_is_a_table() -> None:
    model = nn.ModuleDict({"cell": accelerated(make()), "short": SyncBatchNormSwish(4, momentum=None)})
    report = nf.acceleration_report(model)
    lines = str(report).splitlines()
    assert lines[0] == "5 parts replaced, 1 left"
    assert lines[1].split(None, 2) == ["replaced", "cell", "whole inverted residual cell"]
    assert any(line.endswith("batch norm + swish (within cell)") for line in lines)
    assert lines[-1].split(None, 2)[:2] == ["left", "short"]
    texts = {
        line.index(text)
        for line, text in zip(lines[1:], ("whole", "batch", "depth", "batch", "squeeze", "mom"), strict=True)
    }
    assert len(texts) == 1  # one column
    copied = copy.deepcopy(report)
    assert copied == report


def test_classes_that_cannot_be_seen_through_are_left() -> None:
    class Odd(InvertedResidual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean()

    model = Cell([Odd(12, 12, 1)], nn.Identity(), 12, use_se=False)
    report = nf.acceleration_report(nf.accelerate(model))
    assert dict(report.replaced)[""] == "residual cell"
    assert "the output would differ" in dict(report.notes)[""]
