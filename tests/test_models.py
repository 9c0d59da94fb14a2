"""The whole model against the recorded official numbers, and what the records do not cover."""

from __future__ import annotations

import pytest
import torch
from harness import Record, assert_close, assert_same_gradients, relative_error

import nvae_fast as nf
from nvae_fast.models.architectures import ARCHITECTURES
from nvae_fast.models.regularization import convolutions
from nvae_fast.ops.inverted_residual.train import NAME as CELL
from nvae_fast.training import balanced_kl, kl_balance

MODELS = ["mnist_tiny", "cifar10_flow_tiny"]


def load(record: Record, memory_format: torch.memory_format, device: torch.device) -> nf.NVAE:
    model = nf.NVAE(nf.NVAEConfig.from_official(record.args))
    model.load_official_state_dict(record.under("state/"))
    return model.to(device, memory_format=memory_format)


def noise_of(record: Record, prefix: str, groups: int, device: torch.device) -> list[torch.Tensor]:
    return [record[f"{prefix}{i}"].to(device) for i in range(groups)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_recorded_pass(
    name: str, mode: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    record = Record(name)
    model = load(record, memory_format, device).train(mode == "train")
    config = model.config
    x = record["x"].to(device, memory_format=memory_format)
    out = model(x, noise=noise_of(record, "eps/", config.num_groups, device))
    recon = model.reconstruction_loss(out.logits, x)
    balanced = balanced_kl(out.kl, 0.37, config)
    loss = (recon + balanced).mean()

    expected = record.sub(f"{mode}/")
    assert_close(out.logits, expected["logits"], 1e-5, "logits")
    assert_close(out.kl, expected["kl_all"], 1e-5, "kl")
    for group, kl in enumerate(out.kl_per_channel):
        assert_close(kl, expected[f"kl_diag/{group}"], 1e-5, f"kl_per_channel[{group}]")
        assert not kl.requires_grad
    for key, value in (("log_q", out.log_q), ("log_p", out.log_p), ("recon", recon), ("loss", loss)):
        assert_close(value, expected[key], 2e-6, key)
    assert_close(kl_balance(out.kl, config), expected["kl_coeffs"], 1e-5, "kl_coeffs")
    assert_close(balanced, expected["balanced_kl"], 1e-5, "balanced_kl")

    loss.backward()
    gradients = {key: p.grad.cpu() for key, p in model.official_named_parameters() if p.grad is not None}
    if mode == "train":
        assert_same_gradients(gradients, expected.under("grad/"))
        after = model.official_state_dict()
        for key, value in expected.under("state_after/").items():
            assert_close(after[key], value, 5e-6, key)
    else:
        norms = expected.under("grad_norm/")
        total = torch.stack(list(norms.values())).norm()
        for key, norm in norms.items():
            bound = 5e-4 * max(float(norm), 1e-4 * float(total))
            assert abs(float(gradients[key].norm()) - float(norm)) <= bound, key


@pytest.mark.parametrize("name", MODELS)
def test_recorded_regularisers(name: str, device: torch.device) -> None:
    record = Record(name)
    model = load(record, torch.contiguous_format, device)
    spectral, batch_norm = model.regularization()
    assert_close(batch_norm, record["train/bn_loss"], 1e-6, "bn_loss")
    exact = sum(
        torch.linalg.matrix_norm(c.normalized_weight().flatten(1).double(), 2)
        for c in convolutions(model).values()
    )
    assert_close(exact, record["train/spectral_exact"], 1e-6, "spectral_exact")
    shortfall = float(((exact - spectral.double()) / exact).detach())
    assert -1e-6 <= shortfall <= 2e-3, f"spectral estimate is {shortfall:.3g} below the exact value"


@pytest.mark.parametrize("name", MODELS)
def test_recorded_samples(name: str, memory_format: torch.memory_format, device: torch.device) -> None:
    record = Record(name)
    model = load(record, memory_format, device).eval()
    noise = noise_of(record, "sample/eps/", model.config.num_groups, device)
    logits = model.sample(len(noise[0]), float(record["sample/temperature"]), noise=noise)
    assert_close(logits, record["sample/logits"], 1e-5, "sample logits")


# ------------------------------------------------------------------------------ what the records do not cover


def tiny(**changes: object) -> nf.NVAEConfig:
    options = dict(
        dataset="mnist", num_channels_enc=8, num_channels_dec=8, num_latent_scales=2, num_groups_per_scale=2,
        ada_groups=True, num_latent_per_group=3, num_preprocess_blocks=1, num_preprocess_cells=1,
        num_postprocess_blocks=1, num_postprocess_cells=1,
    )  # fmt: skip
    return nf.NVAEConfig(**{**options, **changes})


VARIANTS = {
    **{arch: dict(arch_instance=arch) for arch in ARCHITECTURES},
    "vanilla": dict(num_latent_scales=1, num_groups_per_scale=1, num_nf=1),
    "one scale": dict(num_latent_scales=1, num_groups_per_scale=3, ada_groups=False, num_nf=2),
    "three scales": dict(num_latent_scales=3, num_groups_per_scale=4, min_groups_per_scale=2, use_se=False),
    "different widths": dict(
        num_channels_enc=8, num_channels_dec=12, num_cell_per_cond_enc=2, num_cell_per_cond_dec=2
    ),
    "absolute": dict(res_dist=False),
    "rgb mixture 5 bits": dict(dataset="cifar10", num_x_bits=5, num_mixture_dec=3),
    "rgb normal": dict(dataset="cifar10", num_mixture_dec=1),
    "custom gray normal": dict(dataset="custom", image_size=16, image_channels=1, likelihood="normal"),
    "one latent channel": dict(num_latent_per_group=1, num_nf=1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_samples(variant: str) -> None:
    config = tiny(**VARIANTS[variant])
    model = nf.NVAE(config).train()
    x = torch.rand(2, config.channels, config.resolution, config.resolution).round()
    out = model(x, seed=1)
    assert out.logits.shape == (2, config.head_channels, config.resolution, config.resolution)
    assert out.kl.shape == (2, config.num_groups)
    assert len(out.kl_per_channel) == config.num_groups
    assert torch.allclose(torch.stack([k.sum() for k in out.kl_per_channel]), out.kl.mean(0), rtol=1e-4)
    if config.num_nf:  # the KL is the sampled one
        assert torch.allclose(out.kl.sum(1), out.log_q - out.log_p, rtol=1e-4, atol=1e-2)
    spectral, batch_norm = model.regularization()
    loss = (model.reconstruction_loss(out.logits, x) + out.kl.sum(1)).mean() + 0.01 * (spectral + batch_norm)
    loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == ({"top_feature"} if config.is_vanilla else set())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    model.eval()
    with torch.no_grad():
        logits = model.sample(3, temperature=0.8, seed=5)
        assert torch.equal(logits, model.sample(3, temperature=0.8, seed=5))
        assert not torch.equal(logits, model.sample(3, temperature=0.8, seed=6))
        # Images do not depend on the batch they are drawn in, but for the order in which convolutions sum.
        assert relative_error(model.sample(2, temperature=0.8, seed=5), logits[:2]) < 1e-5
        likelihood = model.likelihood(logits)
        side = config.resolution
        for image in (likelihood.sample(temperature=0.9, seed=1), likelihood.mean()):
            assert image.shape == (3, config.channels, side, side)
            assert image.min() >= 0
            assert image.max() <= 1
        log_prob = likelihood.log_prob(likelihood.mean().round())
        assert log_prob.shape == (3, side, side)
        border = config.reconstruction_border
        inner = log_prob[:, border : side - border, border : side - border].sum((1, 2))
        assert_close(model.reconstruction_loss(logits, likelihood.mean().round()), -inner, 1e-6)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "celeba_64", "imagenet_32", "celeba_256", "ffhq"])
def test_presets(name: str) -> None:
    config = nf.NVAEConfig.preset(name)
    groups = {"mnist": [5, 10], "cifar10": [30], "celeba_64": [5, 10, 20], "imagenet_32": [28]}
    assert config.groups_per_scale == groups.get(name, [4, 4, 4, 8, 16])
    assert len(config.z_shapes) == config.num_groups
    assert config.z_shapes[-1][1] == config.resolution // 2**config.num_preprocess_blocks
    assert config.dims == {"mnist": 784, "celeba_64": 64 * 64 * 3}.get(
        name, 32 * 32 * 3 if "_256" not in name and name != "ffhq" else 256 * 256 * 3
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in nf.NVAE(config).parameters()) > 1e6


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dataset="lsun"), "dataset must be one of .*'mnist'.*got 'lsun'"),
        (dict(dataset="custom"), "'custom' also needs image_size, image_channels, likelihood"),
        (dict(arch_instance="resnet"), "arch_instance must be one of"),
        (dict(num_postprocess_blocks=2), "must be equal .* got 1 and 2"),
        (dict(num_latent_scales=6), "must be a multiple of 64"),
        (dict(num_x_bits=9), "num_x_bits must be between 1 and 8"),
        (dict(num_groups_per_scale=0), "num_groups_per_scale must be >= 1, got 0"),
        (dict(num_nf=-1), "num_nf must be >= 0"),
        (dict(num_latent_per_group=2.5), "num_latent_per_group must be int, got 2.5"),
        (dict(use_se="yes"), "use_se must be bool"),
        (dict(likelihood="poisson"), "likelihood must be one of"),
        (dict(dataset="mnist", likelihood="mixture_logistic"), "RGB"),
    ],
)
def test_config_explains_what_is_wrong(changes: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(**changes)


def test_config_round_trips() -> None:
    config = tiny(num_nf=2, image_size=16)
    assert nf.NVAEConfig(**config.to_dict()) == config
    assert config.replace(num_nf=0).num_nf == 0
    with pytest.raises(TypeError, match="unknown options \\['flows'\\]"):
        config.replace(flows=1)
    with pytest.raises(ValueError, match=r"must be one of .*'mnist'.* got 'cifar'"):
        nf.NVAEConfig.preset("cifar")


def test_bad_input_is_explained() -> None:
    model = nf.NVAE(tiny()).eval()
    x = torch.zeros(2, 1, 32, 32)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 32, 32\), got \(2, 1, 28, 28\)"):
        model(x[..., 2:-2, 2:-2])
    with pytest.raises(TypeError, match=r"floating-point dtype.*got torch\.uint8"):
        model(x.byte())
    with pytest.raises(ValueError, match=r"one entry per group \(3\), got 2"):
        model(x, noise=[None, None])
    with pytest.raises(ValueError, match=r"noise\[1\] must have shape \(2, 3, 16, 16\), got \(2, 3, 8, 8\)"):
        model(x, noise=[None, torch.zeros(2, 3, 8, 8), None])
    with pytest.raises(ValueError, match="temperature must be a finite number >= 0, got -1"):
        model.sample(1, temperature=-1)
    with pytest.raises(ValueError, match="n must be an int >= 0"):
        model.sample(-1)
    with pytest.raises(ValueError, match=r"logits must have shape \(B, 1, H, W\)"):
        model.likelihood(torch.zeros(1, 2, 4, 4))
    wrong = [
        (lambda: model(x, noise=3), "NVAE: noise must be a sequence with one entry per group, got int"),
        (
            lambda: model(x, noise=[None, 1, None]),
            r"NVAE: noise\[1\] must be a torch.Tensor, got int",
        ),
        (lambda: model(x, seed="a"), "NVAE: seed must be an int or a 0-d int64 tensor, got str"),
        (lambda: model.likelihood(3), "NVAE.likelihood: logits must be a torch.Tensor, got int"),
        (
            lambda: model.reconstruction_loss(x, None),
            "NVAE.reconstruction_loss: x must be a torch.Tensor, got None",
        ),
        (
            lambda: model.readjust_batch_norm(1.0, passes=1.5),
            "readjust_batch_norm: passes must be an int, got 1.5",
        ),
        (
            lambda: nf.save_official(x, "nowhere"),
            "save_official: model must be an nvae_fast.NVAE, got Tensor",
        ),
        (
            lambda: nf.nn.set_process_group(3, None),
            "set_process_group: module must be a torch.nn.Module, got int",
        ),
        (
            lambda: nf.training.balanced_kl(x[0, 0, :, :3], 0.5, 3),
            "balanced_kl: config must be an NVAEConfig .*got int",
        ),
        (
            lambda: nf.training.balanced_kl(x[0, 0, :, :3], "a", model.config),
            "coefficient must be a number .*got str",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(TypeError, match=r"NVAE: x must be torch.float32 like the model .*got torch.float64"):
        model(x.double())
    with pytest.raises(ValueError, match="NVAE: x must be on cpu like the model, got meta"):
        model(x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x.bfloat16(), seed=1).kl.dtype == torch.float32
    with pytest.raises(ValueError, match="n must be an int >= 0, got True"):
        model.sample(True)
    with pytest.raises(
        ValueError, match="readjust_batch_norm: temperature must be a finite number >= 0, got -1"
    ):
        model.readjust_batch_norm(-1)


def test_manual_seed_governs_the_noise_and_a_seed_overrides_it() -> None:
    model = nf.NVAE(tiny()).eval()
    x = torch.rand(2, 1, 32, 32).round()
    with torch.no_grad():
        torch.manual_seed(3)
        first = model(x).logits
        assert not torch.equal(first, model(x).logits)
        torch.manual_seed(3)
        assert torch.equal(first, model(x).logits)
        assert torch.equal(model(x, seed=4).logits, model(x, seed=torch.tensor(4)).logits)
        # Fixing some groups and drawing the others.
        fixed = [torch.zeros(2, 3, 8, 8), None, None]
        assert torch.equal(model(x, noise=fixed, seed=4).logits, model(x, noise=fixed, seed=4).logits)


def test_memory_formats_agree() -> None:
    model = nf.NVAE(tiny(dataset="cifar10", num_nf=1)).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x, seed=1)
        model.to(memory_format=torch.channels_last)
        out = model(x.to(memory_format=torch.channels_last), seed=1)
    assert_close(out.logits, expected.logits, 1e-5)
    assert_close(out.kl, expected.kl, 1e-5)


@pytest.mark.skipif(nf.backends()[CELL]["cpu"] != "cpp", reason="the kernels are not in use")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dataset", ["cifar10", "mnist"])
def test_an_nchw_model_computes_in_channels_last(dataset: str, frozen: bool) -> None:
    """On a CPU: images and the first feature are converted once, and the results back."""
    model = nf.NVAE(tiny(dataset=dataset))
    x = torch.rand(2, model.config.channels, model.config.resolution, model.config.resolution)
    if frozen:
        model = nf.freeze(model.eval())
    seen: set[bool] = set()
    for part in [*model.preprocess, *model.encoder, *model.decoder, *model.postprocess]:
        part.register_forward_pre_hook(
            lambda _, args: seen.add(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    with torch.no_grad():
        out = model(x, seed=1)
        maps = [
            out.logits,
            *out.z,
            *model.encode(x, seed=1),
            model.sample(2, seed=1),
            model.decode([None, out.z[1]]),
        ]
    assert seen == {True}
    assert all(t.is_contiguous() for t in maps)
    with torch.no_grad():
        again = model(x.contiguous(memory_format=torch.channels_last), seed=1)
    assert again.logits.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(again.logits, out.logits)


def test_autocast_keeps_the_sums_in_fp32() -> None:
    model = nf.NVAE(tiny())
    x = torch.rand(4, 1, 32, 32).round()
    out32 = model(x, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, seed=1)
        spectral, _ = model.regularization()
    assert out.kl.dtype == out.log_q.dtype == spectral.dtype == torch.float32
    assert_close(out.kl.sum(), out32.kl.sum(), 0.02)
    (model.reconstruction_loss(out.logits, x) + out.kl.sum(1)).mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_readjusting_batch_norm_moves_the_decoder_only() -> None:
    model = nf.NVAE(tiny()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    model.readjust_batch_norm(0.7, passes=60, batch=4, seed=1)
    assert not model.training
    after = model.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert changed
    assert all(
        (k.startswith(("decoder", "postprocess")) and "running" in k) or "num_batches" in k for k in changed
    )
    # The statistics are those of samples at that temperature: another run of the same seed lands in the same place.
    again = nf.NVAE(tiny()).eval()
    again.load_state_dict({**model.state_dict(), **before})
    again.readjust_batch_norm(0.7, passes=60, batch=4, seed=1)
    first, second = model.state_dict(), again.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in changed)
    with pytest.raises(ValueError, match="passes and batch must be >= 1"):
        model.readjust_batch_norm(1.0, passes=0)


def test_own_state_round_trips_with_the_power_iteration(tmp_path) -> None:
    model, other = nf.NVAE(tiny()), nf.NVAE(tiny())
    model.regularization()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert other.spectral.warm
    assert torch.equal(torch.stack(model.regularization()), torch.stack(other.regularization()))


def test_model_deep_copies_and_moves_dtype() -> None:
    import copy

    model = nf.NVAE(tiny(num_nf=1)).double().eval()
    twin = copy.deepcopy(model)
    x = torch.rand(1, 1, 32, 32, dtype=torch.float64).round()
    out = twin(x, seed=2)
    assert out.kl.dtype == torch.float64
    assert torch.equal(out.logits, model(x, seed=2).logits)
    assert model.regularization()[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("images", "noise", "message"),
    [
        (torch.zeros(1, 1, 4, 4), None, "at least 2 images"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.float64), None, "torch.float32 like the model"),
        (
            torch.zeros(2, 1, 4, 4),
            [None, torch.ones(2, 2, 1, 1, dtype=torch.int64)],
            r"noise\[1\] must have one of",
        ),
        (torch.zeros(2, 1, 4, 4), [1.0, 2.0], r"noise\[0\] must be a torch.Tensor"),
    ],
)
def test_a_forward_that_fails_leaves_the_running_statistics(images, noise, message) -> None:
    """A layer in the middle would say it too, when those before it have counted the batch."""
    model = nf.NVAE(
        nf.NVAEConfig(
            dataset="custom", image_size=4, image_channels=1, likelihood="bernoulli", num_groups_per_scale=2,
            num_channels_enc=4, num_channels_dec=4, num_latent_per_group=2,
        )
    )  # fmt: skip
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises((TypeError, ValueError), match=message):
        model(images, noise=noise)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.eval()
    if "images" in message:
        model(images)  # one image is enough for given statistics


def test_a_width_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="num_channels_enc must be >= 2"):
        nf.NVAEConfig(num_channels_enc=1)
    with pytest.raises(ValueError, match="n must be an int"):
        nf.NVAE(nf.NVAEConfig(num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=1)).sample(True)
