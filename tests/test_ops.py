"""What every operator must do, for each description of tests/descriptions. An operator's own file tests what is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from descriptions import INPUT, Description, Sample, every
from harness import (
    DTYPES,
    HALF,
    Tensors,
    assert_accurate,
    assert_close,
    assert_compiles,
    assert_empty_works,
    assert_gradcheck,
    assert_indifferent_to_layout,
    assert_no_double_backward,
    assert_repeatable,
    assert_same,
    evaluate,
    place,
    strided,
)
from recording import Recorder
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_map_only

import nvae_fast as nf

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = every()
# Described elsewhere: draws without arguments to differentiate in tests/test_philox.py, the cell in a file of its own.
ELSEWHERE = {"philox", "inverted_residual_cell"}
FORMATS = (torch.contiguous_format, torch.channels_last)


def with_samples(kind: str, gradients: bool = False) -> Any:
    """Parametrise by every description (with ``gradients``: that has any) and its samples of that kind."""
    pairs = [(d, s) for d in EVERY.values() if d.differentiable or not gradients for s in getattr(d, kind)]
    return pytest.mark.parametrize("of, sample", pairs, ids=[f"{d.name}-{s.label}" for d, s in pairs])


def having(chosen: Callable[[Description], Any] = lambda of: True) -> Any:
    """Parametrise by the descriptions that are chosen."""
    found = [of for of in EVERY.values() if chosen(of)]
    return pytest.mark.parametrize("of", found, ids=[of.name for of in found])


def bound(function: Callable[..., Any], sample: Sample) -> Callable[..., Any]:
    """The function with the sample's options."""
    return lambda **tensors: function(**tensors, **sample.options)


def in_float32(sample: Sample, device: torch.device | str = "cpu") -> Tensors:
    return place(sample.tensors(), torch.float32, torch.contiguous_format, torch.device(device))


def outputs(found: Any) -> tuple[torch.Tensor, ...]:
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def first(found: Any) -> torch.Tensor:
    return outputs(found)[0]


def test_every_operator_is_described() -> None:
    assert set(EVERY) | ELSEWHERE >= set(nf.backends())


# ---------------------------------------------------------------------------------- truth


@with_samples("samples")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(
    of: Description,
    sample: Sample,
    dtype: torch.dtype,
    route: str,
    memory_format: torch.memory_format,
    device: torch.device,
) -> None:
    """Against float64, and the dtypes and memory formats of results."""
    tensors = place(sample.tensors(), dtype, memory_format, device)
    function = bound(of.op, sample)
    assert_accurate(
        function,
        bound(of.formula, sample),
        tensors,
        of.names(sample),
        eager=None if of.eager is None else bound(of.eager, sample),
        factor=of.factor,
        vector_floor=of.vector_floor * torch.finfo(dtype).eps,
        rounding=sample.rounding,
    )
    for found, expected in zip(outputs(function(**tensors)), of.results, strict=False):
        assert found.dtype == (dtype if expected is INPUT else expected)
        if (
            of.keeps_format
            and found.dim() == 4
            and found.shape[1] > 1
            and found.shape[2] * found.shape[3] > 1
        ):
            assert found.is_contiguous(memory_format=memory_format), "the memory format is kept"


@with_samples("samples")
def test_float64(of: Description, sample: Sample, route: str, memory_format: torch.memory_format) -> None:
    """Computed in float64 from end to end."""
    tensors = place(sample.tensors(), torch.float64, memory_format, torch.device("cpu"))
    actual = evaluate(bound(of.op, sample), tensors, of.names(sample))
    for name, expected in evaluate(bound(of.formula, sample), tensors, of.names(sample)).items():
        assert actual[name].dtype == torch.float64
        values, gradients = of.float64
        assert_close(actual[name], expected, gradients * sample.cancels if "grad" in name else values, name)


@with_samples("small", gradients=True)
def test_gradcheck(of: Description, sample: Sample, route: str) -> None:
    assert_gradcheck(bound(of.op, sample), sample.tensors(), of.names(sample))


@with_samples("layouts", gradients=True)
def test_each_gradient_alone(of: Description, sample: Sample, route: str, device: torch.device) -> None:
    """A gradient does not depend on which others are wanted."""
    tensors = in_float32(sample, device)
    function, names = bound(of.op, sample), of.names(sample)
    whole = evaluate(function, tensors, names)
    for name in names:
        alone = evaluate(function, tensors, (name,))
        assert_close(alone[f"grad {name}"], whole[f"grad {name}"], 1e-6, name)


# ------------------------------------------------------------------------ PyTorch's tools


@with_samples("small")
@pytest.mark.parametrize("route", ["operator"], indirect=True)
def test_opcheck(
    of: Description, sample: Sample, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    """The registered operators behind a call, forward and backward: schema, fake, autograd, and tracing."""
    tensors = place(sample.tensors(), torch.float32, memory_format, device)
    with Recorder() as recorder:
        evaluate(bound(of.op, sample), tensors, of.names(sample))
    assert of.name in recorder.calls
    for calls in recorder.calls.values():
        for operator, args in calls.values():
            if not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "Autograd"):
                args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
            torch.library.opcheck(operator, args)


@having()
def test_compiles(of: Description, device: torch.device) -> None:
    """Without autocast and with it in one graph; what follows the operator is still under autocast."""
    sample = of.small[0]
    function = bound(of.op, sample)

    def twice(**tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plain = function(**tensors)
        with torch.autocast(device.type, torch.bfloat16):
            mixed = function(**tensors)
            after = torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)
        return (*outputs(plain), *outputs(mixed), after)

    tensors = in_float32(sample, device)
    assert_compiles(twice, tensors, of.names(sample), backend=of.compiler)
    assert twice(**tensors)[-1].dtype == torch.bfloat16


@having(lambda of: of.differentiable)
def test_no_double_backward(of: Description, route: str) -> None:
    """An error that says what to do, instead of gradients that are wrong; the reference has second derivatives."""
    sample = of.small[0]
    leaves = {name: t.requires_grad_(name in of.names(sample)) for name, t in sample.tensors().items()}
    leaf = leaves[of.names(sample)[0]]
    output = first(of.op(**leaves, **sample.options))
    if route == "operator":
        assert_no_double_backward(of.name, output, leaf)
    else:
        (gradient,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
        assert gradient.isfinite().all()


# ------------------------------------------------------------------------------- layouts


@with_samples("layouts")
def test_strided_inputs(of: Description, sample: Sample, route: str, device: torch.device) -> None:
    assert_indifferent_to_layout(bound(of.op, sample), in_float32(sample, device), of.names(sample))


@with_samples("layouts")
def test_inputs_of_both_memory_formats(
    of: Description, sample: Sample, route: str, device: torch.device
) -> None:
    """In turn: each of the maps may have a format of its own."""
    tensors = in_float32(sample, device)
    maps = [name for name, t in tensors.items() if t.dim() == 4]
    expected = evaluate(bound(of.op, sample), tensors, of.names(sample))
    for start in range(2):
        turned = {name: tensors[name].contiguous(memory_format=FORMATS[1]) for name in maps[start::2]}
        found = evaluate(bound(of.op, sample), {**tensors, **turned}, of.names(sample))
        assert_same(found, expected, 2e-6)


@with_samples("layouts")
def test_repeatable(
    of: Description, sample: Sample, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    tensors = place(sample.tensors(), torch.float32, memory_format, device)
    assert_repeatable(bound(of.op, sample), tensors, of.names(sample))


@with_samples("layouts")
def test_empty(of: Description, sample: Sample, route: str, device: torch.device) -> None:
    tensors = in_float32(sample, device)
    batched = [n for n, t in tensors.items() if (n in of.batched if of.batched is not None else t.dim() == 4)]
    empty = {**tensors, **{name: tensors[name][:0] for name in batched}}
    found = assert_empty_works(bound(of.op, sample), empty, of.names(sample))
    like = sample.tensors()
    like.update({name: like[name][:0] for name in batched})
    for i, expected in enumerate(outputs(of.op(**like, **sample.options))):
        whole = outputs(of.op(**sample.tensors(), **sample.options))[i]
        output = found[f"output {i}"]
        assert output.shape == expected.shape
        assert output.shape[1:] == whole.shape[1:]


# -------------------------------------------------------------------------------- dtypes


@having(lambda of: of.halved != () and len(of.layouts[0].tensors()) > 1)
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_precision_beside_float32(
    of: Description, half: torch.dtype, route: str, memory_format: torch.memory_format
) -> None:
    """What autocast makes: the result follows the first argument, each gradient its own tensor."""
    sample = of.layouts[0]
    tensors = place(sample.tensors(), torch.float32, memory_format, torch.device("cpu"))
    for name in [next(iter(tensors))] if of.halved is None else of.halved:
        tensors[name] = tensors[name].to(half)
    found = evaluate(bound(of.op, sample), tensors, of.names(sample))
    widened = {n: t.double() for n, t in tensors.items()}
    expected = evaluate(bound(of.op, sample), widened, of.names(sample))
    for key, value in found.items():
        assert_close(value, expected[key], 4 * torch.finfo(half).eps, key)
        if key.startswith("grad"):
            assert value.dtype == tensors[key.removeprefix("grad ")].dtype
    for i, expected_dtype in zip(range(len(found)), of.results, strict=False):
        if f"output {i}" in found:
            assert found[f"output {i}"].dtype == (half if expected_dtype is INPUT else expected_dtype)


@with_samples("layouts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(of: Description, sample: Sample, dtype: torch.dtype, route: str) -> None:
    tensors = place(sample.tensors(), dtype, torch.contiguous_format, torch.device("cpu"))
    plain = outputs(of.op(**tensors, **sample.options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = outputs(of.op(**tensors, **sample.options))
    for a, b in zip(plain, under, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------- values


POISONED = [(of, name, value) for of in EVERY.values() for name in of.poison for value in of.bad_values]


@pytest.mark.parametrize("of, name, value", POISONED, ids=[f"{of.name}-{n}-{v}" for of, n, v in POISONED])
def test_non_finite_values_propagate(of: Description, name: str, value: float, route: str) -> None:
    """To the elements that depend on them, and to no others."""
    sample = of.samples[0]
    tensors = in_float32(sample)
    tensors[name][of.poison[name]] = value
    found, expected = (outputs(f(**tensors, **sample.options)) for f in (of.op, of.formula))
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual.isnan(), wanted.isnan())
        assert torch.equal(actual.isfinite(), wanted.isfinite())
    if value != value:
        assert any(wanted.isnan().any() for wanted in expected)


BAD = [(of, *error) for of in EVERY.values() for error in of.errors]


@pytest.mark.parametrize("of, bad, kind, message", BAD, ids=[f"{of.name}-{m[:32]}" for of, _, _, m in BAD])
def test_errors_name_operator_and_argument(
    of: Description, bad: dict[str, Any], kind: type[Exception], message: str, route: str
) -> None:
    with pytest.raises(kind, match=f"^{of.name}: {message}"):
        (of.call or of.op)(**{**of.good, **bad})


# --------------------------------------------------------------------------------- noise


@having(lambda of: of.drawn)
def test_one_seed_draws_the_same_noise(of: Description, route: str, device: torch.device) -> None:
    """In every layout, on every backend, for a prefix of the batch, with a seed that is a number or a tensor."""
    assert of.drawn is not None
    sample = of.layouts[0]
    packed = next(iter(in_float32(sample, device).values()))
    z = of.drawn(packed, 42)
    assert torch.equal(of.drawn(packed, 42), z)
    assert torch.equal(of.drawn(packed, torch.tensor(42, device=device)), z)
    assert_close(of.drawn(packed.contiguous(memory_format=torch.channels_last), 42), z, 1e-6, "channels_last")
    assert_close(of.drawn(strided(packed), 42), z, 1e-6, "strided")
    assert_close(of.drawn(packed[:2], 42), z[:2], 1e-6, "a prefix of the batch")
    assert (of.drawn(packed, 43) - z).abs().max() > 0.1
    with nf.use_backend("reference"):
        assert_close(of.drawn(packed, 42), z, 2e-6, "the reference")
    if of.given is not None:
        noise = nf.philox_normal(tuple(z.shape), 42, device=device)
        assert_close(of.given(packed, noise), z, 1e-6, "the noise is the Philox stream of the seed")


@having(lambda of: of.drawn)
def test_drawn_seeds_follow_the_default_generator(of: Description, route: str) -> None:
    assert of.drawn is not None
    packed = next(iter(in_float32(of.layouts[0]).values()))
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(of.drawn(packed, None))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[2], of.drawn(packed, None)), "a second call draws anew"


# ---------------------------------------------------------------------------- transforms


def forward_mode(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Without torch.func: dual numbers."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "grad": lambda f, x: grad(lambda t: f(t).sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
    "dual numbers": forward_mode,
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "gradients of samples": lambda f, x: vmap(grad(lambda t: f(t[None]).sum()))(x),
    "hessian": lambda f, x: hessian(lambda t: f(torch.cat([t, x[:, :, :, 1:]], 3)).sum())(x[:, :, :, :1]),
}


@having(lambda of: of.single)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms(of: Description, transform: str, route: str) -> None:
    """A fused kernel cannot follow a transform; the reference can."""
    assert of.single is not None
    function, size = of.single
    x = torch.randn(2, *size, dtype=torch.float64)

    def f(t: torch.Tensor) -> torch.Tensor:
        return first(function(t))

    found = TRANSFORMS[transform](f, x)
    with nf.use_backend("reference"):
        expected = TRANSFORMS[transform](f, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert expected.count_nonzero() > 0


# (PyTorch's own batch norm fails there.)
@having(lambda of: of.single and of.name != "batch_norm_swish")
def test_a_derivative_inside_a_compiled_function(of: Description) -> None:
    assert of.single is not None
    function, size = of.single
    x = torch.randn(2, *size, dtype=torch.float64)

    def derivative(t: torch.Tensor) -> torch.Tensor:
        return jvp(lambda s: first(function(s)), (t,), (torch.ones_like(t),))[1]

    torch._dynamo.reset()
    compiled = torch.compile(derivative, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), derivative(x), rtol=1e-9, atol=1e-9)
