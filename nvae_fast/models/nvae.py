"""NVAE: a deep hierarchical variational autoencoder (Vahdat and Kautz, arXiv 2007.03898).

Bottom-up tower, top-down tower with residual-normal latent groups, optional flows, likelihood head. The same code runs
on a CPU, one GPU or many processes; nothing is global. Specification sections 4 to 6.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from nvae_fast import distributed
from nvae_fast.models import official_keys
from nvae_fast.models.architectures import ARCHITECTURES, make_cell
from nvae_fast.models.checkpointing import recomputed
from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.frozen import is_frozen, refuse
from nvae_fast.models.likelihoods import Bernoulli, Likelihood, MixtureLogistic, Normal
from nvae_fast.models.pixels import can_read, check_unit_range, warn_if_gray
from nvae_fast.models.regularization import SpectralEstimate, batch_norm_regularizer, convolutions
from nvae_fast.models.seeds import check_per_image, is_per_image, per_image_noise
from nvae_fast.models.states import check_values, plain_name, plain_names
from nvae_fast.nn import (
    BatchNormSwish,
    DecoderCombiner,
    EncoderCombiner,
    FlowCell,
    ResidualCell,
    WeightNormConv2d,
)
from nvae_fast.nn.shared_weights import prepare_weights
from nvae_fast.nn.state import check_state
from nvae_fast.ops import _checks
from nvae_fast.ops.elu import elu
from nvae_fast.ops.normal_log_prob import normal_log_prob
from nvae_fast.ops.normal_sample import normal_sample
from nvae_fast.ops.philox import as_seed, split_seed
from nvae_fast.ops.residual_normal import residual_normal

Draw = tuple[torch.Tensor | None, torch.Tensor | None]  # a group's noise or seed


class NVAEOutput(NamedTuple):
    """Result of a forward pass, for a batch of B images and G latent groups.

    A named tuple, so that DataParallel, FSDP and torch.export find the tensors. ``logits``: parameters of the likelihood
    (B, head_channels, H, W). ``kl`` (B, G) in nats. ``kl_per_channel``: per group, (Z,) mean over the batch of the KL summed
    over pixels (a monitor, no gradient: a latent channel counts as active above 0.1). ``log_q``, ``log_p`` (B,):
    log-densities of the sample under posterior and prior, summed over groups.
    """

    logits: torch.Tensor
    kl: torch.Tensor
    kl_per_channel: list[torch.Tensor]
    log_q: torch.Tensor
    log_p: torch.Tensor


class NVAE(nn.Module):
    """The model of a :class:`NVAEConfig`. Images go in as (B, C, H, W) in [0, 1].

    Calling it gives a :class:`NVAEOutput`; the negative evidence bound of an image is
    ``reconstruction_loss(out.logits, x) + out.kl.sum(1)``. NVAE (arXiv 2007.03898).

    Args:
        config: the options, of which the parameters are made, in PyTorch's default dtype on its default device.

    Raises:
        TypeError: ``config`` is something else.
    """

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        if not isinstance(config, NVAEConfig):
            raise TypeError(f"NVAE: config must be an NVAEConfig, got {type(config).__name__}")
        self.config = c = config
        architecture = ARCHITECTURES[c.arch_instance]
        enc, dec, z = c.num_channels_enc, c.num_channels_dec, c.num_latent_per_group

        def cell(ops: tuple[str, ...], width: int, multiplier: int, stride: int = 1) -> ResidualCell:
            out = {1: multiplier, 2: 2 * multiplier, -1: multiplier // 2}[stride]
            return make_cell(ops, width * multiplier, width * out, stride, c.use_se)

        self.stem = WeightNormConv2d(c.channels, enc, 3)
        multiplier = 1
        self.preprocess = nn.ModuleList()
        for _ in range(c.num_preprocess_blocks):
            for _ in range(c.num_preprocess_cells - 1):
                self.preprocess.append(cell(architecture.preprocess, enc, multiplier))
            self.preprocess.append(cell(architecture.preprocess, enc, multiplier, 2))
            multiplier *= 2

        self.encoder = nn.ModuleList()
        groups_fine_to_coarse = [] if c.is_vanilla else c.groups_per_scale[::-1]
        for scale, groups in enumerate(groups_fine_to_coarse):
            for group in range(groups):
                for _ in range(c.num_cell_per_cond_enc):
                    self.encoder.append(cell(architecture.encoder, enc, multiplier))
                if not (scale == c.num_latent_scales - 1 and group == groups - 1):
                    self.encoder.append(EncoderCombiner(dec * multiplier, enc * multiplier))
            if scale < c.num_latent_scales - 1:
                self.encoder.append(cell(architecture.encoder, enc, multiplier, 2))
                multiplier *= 2

        self.encoder_head = WeightNormConv2d(enc * multiplier, enc * multiplier, 1)
        _, height, width = c.z_shapes[0]
        self.top_feature = nn.Parameter(torch.rand(dec * multiplier, height, width))

        self.posterior = nn.ModuleList()
        self.prior = nn.ModuleList()
        self.flows = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for scale, groups in enumerate(c.groups_per_scale):
            for group in range(groups):
                first = scale == 0 and group == 0
                self.posterior.append(WeightNormConv2d(enc * multiplier, 2 * z, 3))
                if not first:
                    self.prior.append(WeightNormConv2d(dec * multiplier, 2 * z, 1))
                for _ in range(c.num_nf):
                    self.flows.append(FlowCell(z))
                if c.is_vanilla:
                    continue
                for _ in range(0 if first else c.num_cell_per_cond_dec):
                    self.decoder.append(cell(architecture.decoder, dec, multiplier))
                self.decoder.append(DecoderCombiner(dec * multiplier, z, dec * multiplier))
            if scale < c.num_latent_scales - 1:
                self.decoder.append(cell(architecture.decoder, dec, multiplier, -1))
                multiplier //= 2
        self.vanilla_stem = WeightNormConv2d(z, dec * multiplier, 1) if c.is_vanilla else None

        self.postprocess = nn.ModuleList()
        for _ in range(c.num_postprocess_blocks):
            self.postprocess.append(cell(architecture.postprocess, dec, multiplier, -1))
            multiplier //= 2
            for _ in range(c.num_postprocess_cells - 1):
                self.postprocess.append(cell(architecture.postprocess, dec, multiplier))
        self.image_head = WeightNormConv2d(dec * multiplier, c.head_channels, 3)
        self.spectral = SpectralEstimate(self)
        # Activation checkpointing: keep the input of each cell only and compute the cell again in the backward pass.
        self.checkpoint_cells = False
        self._checked: set[tuple[str, bool]] = set()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        check_state(self, state_dict, prefix)  # all of it, before any part of the model is written
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True) -> NVAE:
        """As torch.nn.Module.train; RuntimeError for ``mode`` True when the model is frozen."""
        if mode:
            self._refuse_if_frozen("NVAE.train")
        return super().train(mode)

    def _refuse_if_frozen(self, what: str) -> None:
        if is_frozen(self):
            refuse(what)

    # ---------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        x: torch.Tensor,
        noise: Sequence[torch.Tensor | None] | None = None,
        seed: int | torch.Tensor | None = None,
    ) -> NVAEOutput:
        """Encode, sample every group, decode.

        Args:
            x: images (B, C, H, W) in [0, 1]. Other ranges are refused.
            noise: per group a standard normal tensor (B, Z, H, W) or None to draw; None draws all.
            seed: int or 0-d int64 tensor; None takes one from the device's default generator. An int64 tensor (B,) holds
                one seed per image: its noise then depends on neither batch nor process.

        Raises:
            ValueError, TypeError: x, noise or seed has the wrong shape, type or device.
        """
        c = self.config
        expected = (c.channels, c.resolution, c.resolution)
        if not isinstance(x, torch.Tensor):
            kind = type(x)
            raise TypeError(f"NVAE: x must be a torch.Tensor, got {kind.__module__}.{kind.__qualname__}")
        if not x.is_floating_point():
            raise TypeError(f"NVAE: x must be of a floating-point dtype with values in [0, 1], got {x.dtype}")
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"NVAE: x must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}"
            )
        self._check_images(x)
        draws = self._draws(noise, seed, x.shape[0], x.device)
        with prepare_weights(self):
            return self._encode_decode(x, draws)

    def _check_images(self, x: torch.Tensor) -> None:
        """Raise for images that a layer inside would refuse, before the batch norms in front of it count the batch."""
        own = self.stem.weight
        _checks.tensor("NVAE", "stem.weight", own)
        if x.device != own.device:
            raise ValueError(f"NVAE: x must be on {own.device} like the model, got {x.device}")
        if x.dtype != own.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"NVAE: x must be {own.dtype} like the model (or use torch.autocast), got {x.dtype}"
            )
        if self.training and x.shape[0] * self.config.z_shapes[0][1] ** 2 == 1:
            norms = [m for m in self.modules() if isinstance(m, BatchNormSwish) and m.training]
            if norms and distributed.world_size(norms[0].process_group) == 1:
                raise ValueError(
                    "NVAE: batch norm needs more than one value per channel while training and the coarsest scale has one "
                    f"pixel: x must hold at least 2 images, got {tuple(x.shape)}"
                )
        self._check_range("NVAE", x)

    def _check_range(self, op: str, x: torch.Tensor) -> None:
        """ValueError unless x is in [0, 1]. On a GPU only the first images of each mode are looked at, for it waits."""
        first = (op, self.training) not in self._checked
        if not can_read(x) or (x.is_cuda and not first):
            return
        check_unit_range(op, "x", x)
        if first and op != "NVAE" and self.config.likelihood_name == "bernoulli":
            warn_if_gray(op, "x", x)
        self._checked.add((op, self.training))

    def _encode_decode(self, x: torch.Tensor, draws: Sequence[Draw]) -> NVAEOutput:
        c = self.config
        s, kept = self._bottom_up(x)
        top = elu(self.encoder_head(elu(s)))
        s = self.top_feature.unsqueeze(0).expand(x.shape[0], -1, -1, -1)
        kl, kl_per_channel = [], []
        log_q_sum: Any = 0.0
        log_p_sum: Any = 0.0
        for index, prefix, combine in self._groups():
            for part in prefix:
                s = self._cell(part, s)
            prior = None if index == 0 else self.prior[index - 1](elu(s))
            if index:
                combiner, feature = kept.pop()
                top = combiner(feature, s)
            sample = residual_normal(
                self.posterior[index](top),
                prior,
                residual=c.res_dist,
                noise=draws[index][0],
                seed=draws[index][1],
            )
            z, group_kl, log_q, log_p = sample
            if c.num_nf:
                for flow in self.flows[index * c.num_nf : (index + 1) * c.num_nf]:
                    z = flow(z)
                log_p = normal_log_prob(z, prior)
                group_kl = log_q - log_p
            kl.append(group_kl.sum(1))
            kl_per_channel.append(group_kl.detach().mean(0))
            log_q_sum = log_q_sum + log_q.sum(1)
            log_p_sum = log_p_sum + log_p.sum(1)
            s = combine(s, z)
        return NVAEOutput(self._image(s), torch.stack(kl, dim=1), kl_per_channel, log_q_sum, log_p_sum)

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        noise: Sequence[torch.Tensor | None] | None = None,
        seed: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Likelihood parameters (n, head_channels, H, W) of images drawn from the prior.

        Args:
            n: number of images. temperature: factor on every prior's sigma, >= 0.
            noise, seed: as in :meth:`forward`.

        Raises:
            ValueError, TypeError: ``n``, ``temperature`` or ``noise`` has the wrong value, shape or type.
        """
        try:
            n = _checks.whole("NVAE.sample", "n", n)
        except TypeError:
            raise ValueError(f"NVAE.sample: n must be an int >= 0, got {n!r}") from None
        if n < 0:
            raise ValueError(f"NVAE.sample: n must be an int >= 0, got {n}")
        draws = self._draws(noise, seed, n, self.top_feature.device)
        with prepare_weights(self):
            return self._generate(n, temperature, draws)

    def _generate(self, n: int, temperature: float, draws: Sequence[Draw]) -> torch.Tensor:
        s = self.top_feature.unsqueeze(0).expand(n, -1, -1, -1)
        for index, prefix, combine in self._groups():
            for part in prefix:
                s = part(s)
            if index:
                prior = self.prior[index - 1](elu(s))
            else:
                z_channels, height, width = self.config.z_shapes[0]
                prior = s.new_zeros(n, 2 * z_channels, height, width)
            z = normal_sample(prior, temperature=temperature, noise=draws[index][0], seed=draws[index][1])
            s = combine(s, z)
        return self._image(s)

    def _draws(
        self,
        noise: Sequence[torch.Tensor | None] | None,
        seed: int | torch.Tensor | None,
        n: int,
        device: torch.device,
    ) -> list[Draw]:
        """(noise, seed) of every group, exactly one of them given."""
        groups = self.config.num_groups
        if noise is None:
            noise = [None] * groups
        if isinstance(noise, torch.Tensor) or not isinstance(noise, Sequence):
            raise TypeError(
                f"NVAE: noise must be a sequence with one entry per group, got {type(noise).__name__}"
            )
        if len(noise) != groups:
            raise ValueError(f"NVAE: noise must have one entry per group ({groups}), got {len(noise)}")
        for i, (eps, shape) in enumerate(zip(noise, self.config.z_shapes, strict=True)):
            if eps is not None:
                _checks.shape("NVAE", f"noise[{i}]", eps, (n, *shape), self.top_feature)
        if all(eps is not None for eps in noise):
            return [(eps, None) for eps in noise]
        if is_per_image(seed):
            check_per_image("NVAE", seed, n, device)
            drawn = per_image_noise(seed, self.config.z_shapes, self.top_feature.dtype)
            return [(own if eps is None else eps, None) for own, eps in zip(drawn, noise, strict=True)]
        seeds = split_seed(_checks.seed("NVAE", seed, device), groups).unbind()
        return [(None, seeds[i]) if eps is None else (eps, None) for i, eps in enumerate(noise)]

    def _bottom_up(self, x: torch.Tensor) -> tuple[torch.Tensor, list[tuple[nn.Module, torch.Tensor]]]:
        """The last feature, and with every combiner the feature that enters it (used in reverse order)."""
        s = self.stem(2.0 * x - 1.0)
        for part in self.preprocess:
            s = self._cell(part, s)
        kept: list[tuple[nn.Module, torch.Tensor]] = []
        for part in self.encoder:
            if isinstance(part, EncoderCombiner):
                kept.append((part, s))
            else:
                s = self._cell(part, s)
        return s, kept

    def _groups(self) -> Iterator[tuple[int, list[nn.Module], Any]]:
        """(group, cells to run before it, how its z joins the running feature) in top-down order."""
        if self.vanilla_stem is not None:
            stem = self.vanilla_stem
            yield 0, [], lambda s, z: stem(z)
            return
        index = 0
        cells: list[nn.Module] = []
        for part in self.decoder:
            if isinstance(part, DecoderCombiner):
                yield index, cells, part
                index, cells = index + 1, []
            else:
                cells.append(part)

    def _cell(self, cell: nn.Module, s: torch.Tensor) -> torch.Tensor:
        return recomputed(cell, s) if self.checkpoint_cells and torch.is_grad_enabled() else cell(s)

    def _image(self, s: torch.Tensor) -> torch.Tensor:
        for part in self.postprocess:
            s = self._cell(part, s)
        return self.image_head(elu(s))

    # ------------------------------------------------------------------------------------------- likelihood

    def likelihood(self, logits: torch.Tensor) -> Likelihood:
        """The distribution over images with parameters ``logits`` (B, head_channels, H, W).

        Raises:
            TypeError, ValueError: ``logits`` is not such a floating tensor.
        """
        c = self.config
        _checks.tensor("NVAE.likelihood", "logits", logits)
        if logits.dim() != 4 or logits.shape[1] != c.head_channels:
            raise ValueError(
                f"NVAE.likelihood: logits must have shape (B, {c.head_channels}, H, W), got {tuple(logits.shape)}"
            )
        if c.likelihood_name == "bernoulli":
            return Bernoulli(logits)
        if c.likelihood_name == "normal":
            return Normal(logits)
        return MixtureLogistic(logits, c.num_mixture_dec, c.num_x_bits)

    def reconstruction_loss(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``-log p(x | z)`` (B,) in nats; the border that is padding (mnist, omniglot) is left out.

        Args:
            logits: (B, head_channels, H, W), as the model returns them.
            x: images (B, C, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: as :meth:`likelihood` and its log_prob.
        """
        op = "NVAE.reconstruction_loss"
        for name, value in (("logits", logits), ("x", x)):
            _checks.feature_map(op, name, value)
        self._check_range(op, x)
        border = self.config.reconstruction_border
        if border:
            inner = (..., slice(border, -border), slice(border, -border))
            logits, x = logits[inner], x[inner]
        return -self.likelihood(logits).log_prob(x).sum((1, 2))

    # --------------------------------------------------------------------------------- regularisation, statistics

    def regularization(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(spectral, batch norm) regularisers, 0-d: sum of the largest singular values, sum of max |gamma|.

        Every call advances the power iteration of the spectral estimate.
        """
        self._refuse_if_frozen("NVAE.regularization")
        with torch.autocast(self.top_feature.device.type, enabled=False), prepare_weights(self):
            weights = {name: conv.normalized_weight() for name, conv in convolutions(self).items()}
            return self.spectral(weights), batch_norm_regularizer(self)

    @torch.no_grad()
    def readjust_batch_norm(
        self,
        temperature: float,
        passes: int = 500,
        batch: int = 16,
        seed: int | torch.Tensor | None = None,
    ) -> None:
        """Re-estimate the batch norm statistics that generation uses, by sampling in training mode.

        Args:
            temperature: of the priors, the one that will be used to generate.
            passes: number of sampling passes. batch: images per pass.
            seed: of the noise; None takes one from the device's default generator.

        Raises:
            TypeError, ValueError: ``passes`` or ``batch`` is no int or below 1, or ``temperature`` no finite number >= 0.
        """
        op = "readjust_batch_norm"
        self._refuse_if_frozen(f"NVAE.{op}")
        passes, batch = _checks.whole(op, "passes", passes), _checks.whole(op, "batch", batch)
        _checks.temperature(op, temperature, zero=True)
        if passes < 1 or batch < 1:
            raise ValueError(f"readjust_batch_norm: passes and batch must be >= 1, got {passes} and {batch}")
        modes = {module: module.training for module in self.modules()}
        seeds = split_seed(as_seed(seed, self.top_feature.device), passes)
        self.train()
        try:
            for sub_seed in seeds:
                self.sample(batch, temperature, seed=sub_seed)
        finally:
            for module, training in modes.items():
                module.training = training

    # ----------------------------------------------------------------------------------------- state dicts

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch.nn.Module.load_state_dict, also for the state of a wrapped model.

        Args:
            state_dict: tensors by name. The names may have the prefixes of torch.compile, data parallelism and averaging, such
                as ``_orig_mod.`` and ``module.``.
            strict: raise for names that are missing or surplus. assign: take the tensors themselves, not their values.

        Raises:
            TypeError: ``state_dict`` is no mapping of names to tensors, or a value is not floating where a weight is.
            ValueError: a name is there twice, with and without a prefix. RuntimeError: names or shapes do not fit.
        """
        op = "NVAE.load_state_dict"
        state = plain_names(op, state_dict)
        own = self.state_dict()
        names = {plain_name(name): name for name in own}
        tensors = {names.get(key, key): value for key, value in state.items()}
        check_values(op, {key: value for key, value in tensors.items() if key in own}, own)
        metadata = getattr(state_dict, "_metadata", None)
        state = OrderedDict(tensors)
        if metadata is not None:
            state._metadata = metadata  # type: ignore[attr-defined]
        return super().load_state_dict(state, strict=strict, assign=assign)

    # ----------------------------------------------------------------------------------- official checkpoints

    def load_official_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load a ``state_dict`` with official keys, strictly: nothing is written unless everything fits.

        Raises:
            ValueError: keys are missing or surplus, or shapes differ; they are named.
            TypeError: it is not a mapping of names to tensors.
        """
        self._refuse_if_frozen("NVAE.load_official_state_dict")
        official_keys.load_state_dict(self, state_dict)

    def official_state_dict(self) -> dict[str, torch.Tensor]:
        """The state under official keys; see :mod:`nvae_fast.models.official`."""
        self._refuse_if_frozen("NVAE.official_state_dict")
        return official_keys.state_dict(self)

    def official_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(official key, parameter) of every parameter; see :mod:`nvae_fast.models.official`."""
        self._refuse_if_frozen("NVAE.official_named_parameters")
        return official_keys.named_parameters(self)
