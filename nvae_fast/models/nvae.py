"""NVAE: a deep hierarchical variational autoencoder (Vahdat and Kautz, arXiv 2007.03898).

Bottom-up tower, top-down tower with residual-normal latent groups, optional flows, likelihood head. The same code runs
on a CPU, one GPU or many processes; nothing is global. Specification sections 4 to 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nvae_fast.models import official_keys
from nvae_fast.models.architectures import ARCHITECTURES, make_cell
from nvae_fast.models.checkpointing import recomputed
from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.frozen import is_frozen, refuse
from nvae_fast.models.inputs import (
    Draw,
    check_images,
    check_latents,
    check_range,
    group_draws,
    group_temperatures,
    posterior_draws,
    warn_if_training,
)
from nvae_fast.models.layout import to_computed_format, to_given_format
from nvae_fast.models.likelihoods import Bernoulli, Likelihood, MixtureLogistic, Normal
from nvae_fast.models.output import NVAEOutput
from nvae_fast.models.regularization import SpectralEstimate, batch_norm_regularizer, convolutions
from nvae_fast.models.states import unwrapped
from nvae_fast.nn import DecoderCombiner, EncoderCombiner, FlowCell, ResidualCell, WeightNormConv2d
from nvae_fast.nn.shared_weights import prepare_weights
from nvae_fast.nn.state import check_state
from nvae_fast.ops import _checks
from nvae_fast.ops.elu import elu
from nvae_fast.ops.normal_log_prob import normal_log_prob
from nvae_fast.ops.normal_sample import normal_sample
from nvae_fast.ops.philox import as_seed, split_seed
from nvae_fast.ops.residual_normal import ResidualNormal, residual_normal


def _sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    return sum(tensors[1:], tensors[0])


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
        check_images("NVAE", self, x)
        draws = self._draws("NVAE", noise, seed, x.shape[0])
        with prepare_weights(self):
            s, groups = self._top_down(x, draws)
            return NVAEOutput(
                self._image(s, x),
                torch.stack([group.kl.sum(1) for group in groups], dim=1),
                [group.kl.detach().mean(0) for group in groups],
                _sum([group.log_q.sum(1) for group in groups]),
                _sum([group.log_p.sum(1) for group in groups]),
                [group.z for group in groups],
            )

    def encode(
        self,
        x: torch.Tensor,
        noise: Sequence[torch.Tensor | None] | None = None,
        seed: int | torch.Tensor | None = None,
        sample: bool = True,
    ) -> list[torch.Tensor]:
        """The latent variables of images: z (B, Z, H, W) of every group, coarsest scale first, as they enter the decoder.

        The same ``noise`` or ``seed`` gives the z of :meth:`forward`. In evaluation mode ``decode(encode(x, seed=s))`` equals
        ``model(x, seed=s).logits`` bit for bit.

        Args:
            x, noise, seed: as in :meth:`forward`.
            sample: draw z from the posterior. False: take the mean of every posterior given those before it, then the flows.

        Raises:
            ValueError, TypeError: x, noise, seed or sample has the wrong shape, type or device, or ``sample`` is False and
                noise or a seed is given.
        """
        draws = posterior_draws("NVAE.encode", self, x, noise, seed, sample)
        with prepare_weights(self):
            return [group.z for group in self._top_down(x, draws)[1]]

    def reconstruct(
        self,
        x: torch.Tensor,
        noise: Sequence[torch.Tensor | None] | None = None,
        seed: int | torch.Tensor | None = None,
        sample: bool = True,
    ) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1]: the mean of the likelihood given the latent variables of ``x``.

        Args:
            x, noise, seed, sample: as in :meth:`encode`.

        Raises:
            ValueError, TypeError: as :meth:`encode`.
        """
        draws = posterior_draws("NVAE.reconstruct", self, x, noise, seed, sample)
        with prepare_weights(self):
            logits = self._image(self._top_down(x, draws)[0])
        return self.likelihood(logits).mean()

    def _top_down(self, x: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, list[ResidualNormal]]:
        """The feature from which the image is computed, and z (after the flows), KL and log-densities of every group."""
        c = self.config
        s, kept = self._bottom_up(x)
        top = elu(self.encoder_head(elu(s)))
        s = to_computed_format(self.top_feature.unsqueeze(0).expand(x.shape[0], -1, -1, -1))
        groups = []
        for index, prefix, combine in self._groups():
            for part in prefix:
                s = self._cell(part, s)
            prior = None if index == 0 else self.prior[index - 1](elu(s))
            if index:
                combiner, feature = kept.pop()
                top = combiner(feature, s)
            noise, seed = draws[index]
            found = residual_normal(
                self.posterior[index](top), prior, residual=c.res_dist, noise=noise, seed=seed
            )
            if c.num_nf:
                z = found.z
                for flow in self.flows[index * c.num_nf : (index + 1) * c.num_nf]:
                    z = flow(z)
                log_p = normal_log_prob(z, prior)
                found = ResidualNormal(z, found.log_q - log_p, found.log_q, log_p)
            groups.append(found._replace(z=to_given_format(found.z, x, self.image_head.weight)))
            s = combine(s, found.z)
        return s, groups

    def decode(
        self,
        latents: Sequence[torch.Tensor | None],
        temperature: float | Sequence[float] = 1.0,
        seed: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Likelihood parameters (B, head_channels, H, W) of images with given latent variables.

        Groups without one are drawn from their prior given the groups before, with the noise that :meth:`sample` draws for
        them from the same seed.

        Args:
            latents: z (B, Z, H, W) of the first groups, in the order of :meth:`encode`; None for a group to be drawn. Groups
                beyond the last entry are drawn.
            temperature: as in :meth:`sample`, of the groups that are drawn.
            seed: as in :meth:`forward`; nothing is drawn from the default generator where every group is given.

        Raises:
            ValueError, TypeError: ``latents``, ``temperature`` or ``seed`` has the wrong value, shape, type or device, or
                ``latents`` holds no tensor.
        """
        op = "NVAE.decode"
        n, latents = check_latents(op, latents, self.config.z_shapes, self.top_feature)
        temperatures = group_temperatures(op, temperature, self.config.num_groups)
        draws = group_draws(op, "latents", latents, seed, n, self.config.z_shapes, self.top_feature)
        with prepare_weights(self):
            return self._generate(n, temperatures, draws, latents)

    def sample(
        self,
        n: int,
        temperature: float | Sequence[float] = 1.0,
        noise: Sequence[torch.Tensor | None] | None = None,
        seed: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Likelihood parameters (n, head_channels, H, W) of images drawn from the prior.

        Args:
            n: number of images.
            temperature: factor on every prior's sigma, >= 0, or one for each group, coarsest scale first.
            noise, seed: as in :meth:`forward`.

        Raises:
            ValueError, TypeError: ``n``, ``temperature`` or ``noise`` has the wrong value, shape or type.
        """
        op = "NVAE.sample"
        try:
            n = _checks.whole(op, "n", n)
        except TypeError:
            raise ValueError(f"{op}: n must be an int >= 0, got {n!r}") from None
        if n < 0:
            raise ValueError(f"{op}: n must be an int >= 0, got {n}")
        temperatures = group_temperatures(op, temperature, self.config.num_groups)
        warn_if_training(op, self)
        draws = self._draws("NVAE", noise, seed, n)
        with prepare_weights(self):
            return self._generate(n, temperatures, draws, [None] * len(draws))

    def _generate(
        self, n: int, temperatures: Sequence[float], draws: Sequence[Draw], latents: Sequence[Any]
    ) -> torch.Tensor:
        s = to_computed_format(self.top_feature.unsqueeze(0).expand(n, -1, -1, -1))
        for index, prefix, combine in self._groups():
            for part in prefix:
                s = self._cell(part, s)
            z = latents[index]
            if z is None:
                z = self._from_prior(index, s, temperatures[index], draws[index])
            s = combine(s, to_computed_format(z))
        return self._image(s)

    def _from_prior(self, index: int, s: torch.Tensor, temperature: float, draw: Draw) -> torch.Tensor:
        """z of a group, drawn from its prior given the running feature ``s``."""
        if index:
            prior = self.prior[index - 1](elu(s))
        else:
            z_channels, height, width = self.config.z_shapes[0]
            prior = s.new_zeros(s.shape[0], 2 * z_channels, height, width)
        return normal_sample(prior, temperature=temperature, noise=draw[0], seed=draw[1])

    def _draws(self, op: str, noise: Any, seed: int | torch.Tensor | None, n: int) -> list[Draw]:
        return group_draws(op, "noise", noise, seed, n, self.config.z_shapes, self.top_feature)

    def _bottom_up(self, x: torch.Tensor) -> tuple[torch.Tensor, list[tuple[nn.Module, torch.Tensor]]]:
        """The last feature, and with every combiner the feature that enters it (used in reverse order)."""
        s = self.stem(to_computed_format(2.0 * x - 1.0))
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

    def _image(self, s: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        for part in self.postprocess:
            s = self._cell(part, s)
        return to_given_format(self.image_head(elu(s)), *given, self.image_head.weight)

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
        check_range(op, self, x, warn_gray=True)
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
        temperature: float | Sequence[float],
        passes: int = 500,
        batch: int = 16,
        seed: int | torch.Tensor | None = None,
    ) -> None:
        """Re-estimate the batch norm statistics that generation uses, by sampling in training mode.

        Args:
            temperature: of the priors, the one that will be used to generate, or one for each group.
            passes: number of sampling passes. batch: images per pass.
            seed: of the noise; None takes one from the device's default generator.

        Raises:
            TypeError, ValueError: ``passes`` or ``batch`` is no int or below 1, or a ``temperature`` is no finite
                number >= 0.
        """
        op = "readjust_batch_norm"
        self._refuse_if_frozen(f"NVAE.{op}")
        passes, batch = _checks.whole(op, "passes", passes), _checks.whole(op, "batch", batch)
        temperatures = group_temperatures(op, temperature, self.config.num_groups)
        if passes < 1 or batch < 1:
            raise ValueError(f"readjust_batch_norm: passes and batch must be >= 1, got {passes} and {batch}")
        modes = {module: module.training for module in self.modules()}
        seeds = split_seed(as_seed(seed, self.top_feature.device), passes)
        self.train()
        try:
            for sub_seed in seeds:
                draws = self._draws("NVAE", None, sub_seed, batch)
                with prepare_weights(self):
                    self._generate(batch, temperatures, draws, [None] * len(draws))
        finally:
            for module, training in modes.items():
                module.training = training

    # --------------------------------------------------------------------- state dicts, official checkpoints

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch.nn.Module.load_state_dict, also for the state of a wrapped model. Nothing is written where it raises, unless
        the model has hooks on loading. A container of models has then loaded its earlier children, as PyTorch does.

        Args:
            state_dict: tensors by name, also with prefixes of wrappers such as ``_orig_mod.`` and ``module.``.
            strict: raise for names that are missing or surplus. assign: take the tensors themselves, not their values.

        Raises:
            TypeError: ``state_dict`` is no mapping of names to tensors, or a value is not floating where a weight is.
            ValueError: a name is there twice, with and without a prefix. RuntimeError: names or shapes do not fit.
        """
        self._refuse_if_frozen("NVAE.load_state_dict")
        state = unwrapped("NVAE.load_state_dict", self, state_dict, strict)
        return super().load_state_dict(state, strict=strict, assign=assign)

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
