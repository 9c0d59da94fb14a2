"""Training steps (forward, loss, regularisers, backward, Adamax), sampling and evaluation of the published settings.

On a GPU they are the settings themselves at their batch per GPU, in bfloat16 autocast. On a CPU they are scaled down
by one rule (`scaled`) so that a step takes about half a second, in float32, and those of `BFLOAT16` in bfloat16 autocast
too; `--full-models` measures the two of `FULL` at a size that is trained in earnest. The two settings at 256 pixels are
alike and one row is measured for them.

``python -m benchmarks.model`` measures them alone, with the options of ``python -m benchmarks``.

This package's own step and sampler are those of `nvae_fast.training`: one CUDA graph each on a GPU. The others run
eagerly, as one would write them.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

import nvae_fast as nf
from benchmarks import measure
from benchmarks.gate import finite, relative_error
from benchmarks.providers import FORMAT_NAMES, MEMORY_FORMATS, OURS, cudnn_benchmark, one_line, time_limit
from benchmarks.timing import Clock, WallClock, interleave
from nvae_fast.nn import FlowCell, ResidualCell
from nvae_fast.training import Sampler, Step, TrainingConfig
from nvae_fast.training.graph import WARM_UP

CASES = {
    "training_step": "forward, loss, regularisers, backward and Adamax",
    "sampling": "images from the prior",
    "evaluation": "the bound of images without gradients",
}
MODULE = "model"
SEED, TEMPERATURE, COEFFICIENT, REGULARIZER = 5, 0.7, 0.5, 1e-2
LEARNING_RATE = 1e-5  # so small that the weights of all providers stay where the gate saw them

# Relative error norms against float64: (loss or logits, all gradients as one vector). bfloat16 has 8 bits,
# and some forty layers of it lie between the image and the first gradient.
TOLERANCES = {"float32": (1e-4, 5e-3), "bfloat16": (5e-2, 0.1)}

# In order of measurement: where time is short, the last ones are skipped. ffhq is celeba_256 with other images.
PRESETS = ("mnist", "cifar10", "celeba_256", "celeba_64", "imagenet_32")
# On a CPU in bfloat16 autocast too, right after float32.
BFLOAT16 = ("cifar10",)
SHRINK, LEAST_CHANNELS, MOST_GROUPS, MOST_PIXELS, BATCH_AT_32 = 8, 8, 2, 64, 8

# On a CPU with --full-models, not scaled: the mnist setting as it is, and cifar10 at half its width and a third of its groups.
FULL: dict[str, tuple[int, dict[str, Any]]] = {
    "mnist": (16, {}),
    "cifar10": (8, {"num_channels_enc": 64, "num_channels_dec": 64, "num_groups_per_scale": 10}),
}
_TINY: dict[str, Any] = {
    "num_latent_scales": 1,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 4,
    "num_preprocess_cells": 1,
    "num_postprocess_cells": 1,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "ada_groups": False,
}


@dataclass(frozen=True)
class Workload:
    """A setting to measure: its name, configuration, batch and precision."""

    preset: str
    config: Any
    batch: int
    precision: str

    @property
    def label(self) -> str:
        c = self.config
        return f"{self.preset} B{self.batch} {c.resolution}px {c.num_channels_dec}ch {c.num_groups} groups"


def scaled(name: str) -> tuple[int, Any]:
    """(batch, configuration) of a preset for a CPU.

    Channels: an eighth, in multiples of 4, at least 8. Latent groups: at most 2 at the finest scale, at least 1 at the
    others. Images: at most 64 pixels a side. Batch: 8 images of 32 pixels, fewer in proportion to the pixels of larger
    ones, at least 2 and at most the preset's. Everything else (cells, scales, flows, likelihood) is the preset's.
    """
    config = nf.NVAEConfig.preset(name)
    width = max(config.num_channels_dec // SHRINK // 4 * 4, LEAST_CHANNELS)
    changes: dict[str, Any] = {
        "num_channels_enc": width,
        "num_channels_dec": width,
        "num_groups_per_scale": min(config.num_groups_per_scale, MOST_GROUPS),
        "min_groups_per_scale": 1,
    }
    if config.resolution > MOST_PIXELS:
        changes["image_size"] = MOST_PIXELS
    side = min(config.resolution, MOST_PIXELS)
    batch = max(BATCH_AT_32 * 32**2 // side**2, 2)
    return min(batch, nf.training.preset(name).training.batch_size), config.replace(**changes)


def workloads(
    device: torch.device, *, quick: bool = False, tiny: bool = False, full: bool = False
) -> list[Workload]:
    """What is measured on ``device``. quick: one scaled-down setting; tiny: one for tests; full: see ``FULL``."""
    if tiny or quick:
        width = 4 if tiny else 16
        config = nf.NVAEConfig.preset("mnist").replace(
            **_TINY, num_channels_enc=width, num_channels_dec=width
        )
        return [Workload("mnist", config, 2 if tiny else 8, "float32")]
    if device.type == "cuda":
        return [
            Workload(
                name,
                nf.NVAEConfig.preset(name),
                nf.training.preset(name).training.batch_size,
                "bfloat16",
            )
            for name in PRESETS
        ]
    found = []
    for name in PRESETS:
        batch, config = scaled(name)
        if full and name in FULL:
            batch, changes = FULL[name]
            config = nf.NVAEConfig.preset(name).replace(**changes)
        found.append(Workload(name, config, batch, "float32"))
        if name in BFLOAT16:
            found.append(Workload(name, config, batch, "bfloat16"))
    return found


class RandnNoise(nn.Module):
    """A model that takes its noise from ``torch.randn``, or from ``given``: what plain PyTorch would do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.given: list[torch.Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def _noise(self, n: int) -> list[torch.Tensor]:
        if self.given is not None:
            return self.given
        device = self.inner.top_feature.device
        return [torch.randn(n, *shape, device=device) for shape in self.inner.config.z_shapes]

    def forward(self, x: torch.Tensor, seed: Any = None) -> Any:
        return self.inner(x, noise=self._noise(x.shape[0]))

    def sample(self, n: int, temperature: float = 1.0, seed: Any = None) -> torch.Tensor:
        return self.inner.sample(n, temperature, noise=self._noise(n))


@dataclass
class Contender:
    """One provider of a whole model in one memory format; absent with a reason, or bound to its own model."""

    provider: str
    memory_format: str
    backend: str = "reference"
    plain_noise: bool = False
    compiled: bool = False
    reason: str = ""

    @property
    def captured(self) -> bool:
        """Whether step and sampler are a CUDA graph where there is a GPU."""
        return self.provider == OURS

    @property
    def name(self) -> str:
        return f"{self.provider} {FORMAT_NAMES[self.memory_format]}"

    @contextlib.contextmanager
    def context(self, device: torch.device) -> Iterator[None]:
        # A cell's code is compiled once for every kind of cell, more often than the compiler's own limit.
        limit = torch._dynamo.config.patch(recompile_limit=256) if self.compiled else contextlib.nullcontext()
        with nf.use_backend(self.backend), cudnn_benchmark(device.type == "cuda"), limit:
            yield


def contenders(device: torch.device) -> list[Contender]:
    """Reference, plain PyTorch noise ("library"), torch.compile of that cell by cell, and this package's
    kernels."""
    with nf.use_backend("auto"):
        fused = [op for op, row in nf.backends().items() if not row[device.type].startswith("reference")]
    ours = "" if fused else f"no op has a kernel of its own on {device.type}"
    found = []
    for memory_format in MEMORY_FORMATS:
        found.append(Contender("reference", memory_format))
        found.append(Contender("library", memory_format, plain_noise=True))
        found.append(Contender("torch.compile", memory_format, plain_noise=True, compiled=True))
        found.append(Contender(OURS, memory_format, backend="auto", reason=ours))
    return found


class Bench:
    """One setting on one device: the model to copy, an image batch, the float64 truth."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload, self.device = workload, device
        torch.manual_seed(SEED)
        c = workload.config
        self.model = nf.NVAE(c).to(device)
        with torch.no_grad():
            self.model.regularization()  # the first spectral estimate takes ten times a step's iterations
        images = torch.rand(workload.batch, c.channels, c.resolution, c.resolution)
        images = images.round() if c.likelihood_name == "bernoulli" else (images * 255).round() / 255
        self.images = images.to(device)
        self.noise = [torch.randn(workload.batch, *shape).to(device) for shape in c.z_shapes]

    def build(self, contender: Contender | None) -> nn.Module:
        """A copy of the model, as the contender has it; in float64 without one."""
        model: nn.Module = copy.deepcopy(self.model)
        if contender is None:
            model = model.double()
            # The spectral estimate is a float32 power iteration whatever the weights are.
            model.spectral.float().register_forward_pre_hook(
                lambda _, args: ({name: weight.float() for name, weight in args[0].items()},)
            )
            return model
        model = model.to(memory_format=MEMORY_FORMATS[contender.memory_format])
        if contender.compiled:
            # Cell by cell: cells of one kind share a graph, where the whole model is too large a one.
            for part in model.modules():
                if isinstance(part, (ResidualCell, FlowCell)):
                    part.compile(dynamic=False)
        return RandnNoise(model) if contender.plain_noise else model

    def images_for(self, contender: Contender | None) -> torch.Tensor:
        if contender is None:
            return self.images.double()
        return self.images.contiguous(memory_format=MEMORY_FORMATS[contender.memory_format])

    def step(self, model: nn.Module, *, double: bool = False, graph: bool = False) -> Step:
        autocast = "bf16" if self.workload.precision == "bfloat16" and not double else None
        config = TrainingConfig(
            autocast=autocast, weight_decay_norm=REGULARIZER, cuda_graph=None if graph else False
        )
        return Step(model, config)


class TrainingRun:
    """A training step of one contender (None: the float64 truth)."""

    def __init__(self, bench: Bench, contender: Contender | None, *, given_noise: bool) -> None:
        double = contender is None
        self.model = bench.build(contender)
        if given_noise:
            _give_noise(self, bench, double)
        self.model.train()
        self.step = bench.step(self.model, double=double, graph=contender is not None and contender.captured)
        self.images = bench.images_for(contender)

    def gate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, all gradients as one vector)."""
        loss, _ = self.step.objective(self.images, SEED, COEFFICIENT, REGULARIZER)
        gradients = torch.autograd.grad(loss, self.step.parameters, allow_unused=True)
        return loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])

    def __call__(self) -> None:
        result = self.step(
            self.images, seed=SEED, coefficient=COEFFICIENT, weight=REGULARIZER, learning_rate=LEARNING_RATE
        )
        if result.skipped:
            raise FloatingPointError("the loss or its gradient is not finite")


class SamplingRun:
    """Drawing images with one contender (None: the float64 truth)."""

    def __init__(self, bench: Bench, contender: Contender | None, *, given_noise: bool) -> None:
        double = contender is None
        self.model = bench.build(contender).eval()
        if given_noise:
            _give_noise(self, bench, double)
        self.batch, self.device = bench.workload.batch, bench.device
        self.autocast = bench.workload.precision == "bfloat16" and not double
        self.sampler = None
        if contender is not None and contender.captured and not given_noise:
            autocast = "bf16" if self.autocast else None
            self.sampler = Sampler(self.model, temperature=TEMPERATURE, autocast=autocast)

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.model.sample(self.batch, TEMPERATURE, seed=SEED)
        return logits if logits.dtype == torch.float64 else logits.float()

    def gate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, nothing): which image is drawn from them is a discrete choice."""
        logits = self.logits()
        return logits, logits.new_zeros(1)

    @torch.no_grad()
    def __call__(self) -> None:
        if self.sampler is not None:
            self.sampler(self.batch, seed=SEED)
            return
        self.model.likelihood(self.logits()).sample(temperature=TEMPERATURE, seed=SEED)


class EvaluationRun:
    """The negative bound of an image batch with one contender (None: the float64 truth), this package's model frozen."""

    def __init__(self, bench: Bench, contender: Contender | None, *, given_noise: bool) -> None:
        double = contender is None
        self.model = bench.build(contender).eval()
        if given_noise:
            _give_noise(self, bench, double)
        elif contender is not None and contender.provider == OURS:
            self.model = nf.freeze(self.model)
        self.device = bench.device
        self.autocast = bench.workload.precision == "bfloat16" and not double
        self.images = bench.images_for(contender)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            out = self.model(self.images, seed=SEED)
        logits = out.logits if out.logits.dtype == torch.float64 else out.logits.float()
        loss: torch.Tensor = self.model.reconstruction_loss(logits, self.images) + out.kl.sum(1)
        return loss

    def gate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss of every image, nothing)."""
        loss = self()
        return loss, loss.new_zeros(1)


def _give_noise(run: Any, bench: Bench, double: bool) -> None:
    """The same noise for the truth and for a contender with a generator of its own."""
    if not isinstance(run.model, RandnNoise):
        run.model = RandnNoise(run.model)
    run.model.given = [eps.double() if double else eps for eps in bench.noise]


_RUNS = {"training_step": TrainingRun, "sampling": SamplingRun, "evaluation": EvaluationRun}
_LAPS = {"training_step": "step", "sampling": "sample", "evaluation": "pass"}


class Budget(Protocol):
    """How much compilation time is left (see ``run.CompileBudget``)."""

    spent: float

    @property
    def left(self) -> float: ...
    def reason(self, *, first: bool) -> str: ...


def measure_model(
    workload: Workload,
    device: torch.device,
    *,
    cases: list[str],
    compile_budget: Budget,
    compiled: bool,
    seconds: float,
    min_rounds: int,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Gate and time ``workload``; one row for each case and contender, in the schema of ``report``."""
    bench = Bench(workload, device)
    rows: list[dict[str, Any]] = []
    for case in cases:
        say(f"{case}  {workload.label}  {workload.precision}")
        rows += _measure(case, bench, compile_budget, compiled, seconds, min_rounds)
        torch._dynamo.reset()
    return rows


def _measure(
    case: str, bench: Bench, budget: Budget, compiled: bool, seconds: float, min_rounds: int
) -> list[dict[str, Any]]:
    workload, device, make = bench.workload, bench.device, _RUNS[case]
    with nf.use_backend("reference"):
        truths = {given: make(bench, None, given_noise=given).gate() for given in (False, True)}
    rows: dict[str, dict[str, Any]] = {}
    samples: dict[str, Callable[[Clock], None]] = {}
    for contender in contenders(device):
        reason = contender.reason
        if contender.compiled:
            reason = budget.reason(first=compiled)
        row: dict[str, Any] = {
            "case": case,
            "module": MODULE,
            "workload": workload.label,
            "dtype": workload.precision,
            "provider": contender.provider,
            "memory_format": FORMAT_NAMES[contender.memory_format],
            "status": "absent" if reason else "ok",
            "reason": reason,
            "passes": {},
        }
        rows[contender.name] = row
        if reason:
            continue
        started = time.perf_counter()
        try:
            with (
                contender.context(device),
                time_limit(max(budget.left, 1.0) if contender.compiled else 0, "compilation"),
            ):
                actual = make(bench, contender, given_noise=contender.plain_noise).gate()
                row["gate"] = _judge(actual, truths[contender.plain_noise], workload.precision)
                row["status"], row["reason"] = row["gate"].pop("status"), row["gate"].pop("reason")
                if row["status"] != "ok":
                    continue
                before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
                run = make(bench, contender, given_noise=False)
                run()  # compiles, tries algorithms, and makes the optimizer's state
                run()
            row |= _costs(run, contender, device, before)
            samples[contender.name] = _sampler(run, contender, device, case)
        except Exception as error:
            # A compiler that gives up is worth knowing, but no fault of ours.
            row["status"] = "absent" if contender.compiled else "failed"
            row["reason"] = one_line(error)
        finally:
            if contender.compiled:
                budget.spent += time.perf_counter() - started
    times, failures = interleave(samples, WallClock(device), seconds=seconds, warmup=1, min_rounds=min_rounds)
    for name, error in failures.items():
        rows[name]["status"], rows[name]["reason"] = "failed", error
    for name, laps in times.items():
        for lap, series in laps.items():
            summary = series.summary()
            summary["images_per_s"] = 1e3 * workload.batch / summary["median_ms"]
            rows[name]["passes"][lap] = summary
    return list(rows.values())


def _judge(actual: Any, expected: Any, precision: str) -> dict[str, Any]:
    names = ("loss or logits", "gradient")
    errors = {name: relative_error(a, e) for name, a, e in zip(names, actual, expected, strict=True)}
    wrong = [
        f"{name}: relative error {errors[name]:.2g} (allowed {tolerance:.2g})"
        for name, tolerance in zip(names, TOLERANCES[precision], strict=True)
        if not errors[name] <= tolerance
    ]
    return {
        "tolerance": max(TOLERANCES[precision]),
        "errors": finite(errors),
        "status": "failed" if wrong else "ok",
        "reason": "; ".join(wrong),
    }


def _costs(run: Callable[[], Any], contender: Contender, device: torch.device, before: int) -> dict[str, Any]:
    """Peak memory, operator calls or kernels and launches. before: bytes held on the GPU before ``run`` was built.

    On the GPU the peak holds model and optimizer too, and what a capture keeps: a replay alone allocates nothing.
    """
    with contender.context(device):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            for _ in range(WARM_UP + 1):
                run()
            torch.cuda.synchronize()
            costs: dict[str, Any] = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
            costs["kernel_launches"] = measure.kernel_launches(run)
            costs["host_launches"] = measure.host_launches(run)
            return costs
        costs = {"peak_bytes": measure.peak_bytes(run, device)}
        if not contender.compiled:
            costs["operator_calls"] = measure.operator_calls(run)
    return costs


def _sampler(
    run: Callable[[], Any], contender: Contender, device: torch.device, case: str
) -> Callable[[Clock], None]:
    def sample(clock: Clock) -> None:
        with contender.context(device):
            clock.start()
            run()
            clock.lap(_LAPS[case])

    return sample


if __name__ == "__main__":
    from benchmarks.run import main

    raise SystemExit(main([*sys.argv[1:], *CASES]))
