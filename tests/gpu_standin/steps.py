"""Training steps and samplers of one configuration on the stand-in GPU, eager and captured; what was seen, as JSON.

``python steps.py CASES.json`` prints a line of JSON a case. A case: kind ("step", "sampler" or "user", who captures without the
package's recorder), model, training, options.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections import Counter
from typing import Any

from start import device, driver, jit_functions, nf, stand_in, torch

from nvae_fast.kernels import weight_norm
from nvae_fast.training import Step, TrainingConfig
from nvae_fast.training.graph import WARM_UP
from nvae_fast.training.sampler import Sampler
from nvae_fast.training.step import StepResult

SMALL = {
    "num_channels_enc": 4, "num_channels_dec": 4, "num_groups_per_scale": 2, "num_preprocess_cells": 1,
    "num_postprocess_cells": 1, "num_latent_per_group": 2,
}  # fmt: skip
# Nothing that a Triton kernel should have written is a number, so no step would count.
Step._decide = lambda self, values: StepResult(*[0.0] * 6, skipped=False)


def model_of(case: dict[str, Any]) -> nf.NVAE:
    torch.manual_seed(0)
    model = nf.NVAE(nf.NVAEConfig(**{**SMALL, **case.get("model", {})}))
    return model.to("cuda").to(memory_format=torch.channels_last)


def images(case: dict[str, Any], config: nf.NVAEConfig) -> torch.Tensor:
    size = (case.get("batch", 4), config.channels, config.resolution, config.resolution)
    return torch.rand(size, device="cuda").contiguous(memory_format=torch.channels_last)


def other_work() -> None:
    """What a program does between two replays: more layers are normalised than tables are kept, and garbage is collected."""
    kept = [torch.empty(4, 3, 1, 1, device="cuda") for _ in range(weight_norm.TABLES + 2)]
    norm = torch.empty(4, 1, 1, 1, device="cuda")
    for weight in kept:
        nf.weight_norm(weight, norm)
    gc.collect()


def step(case: dict[str, Any]) -> None:
    model = model_of(case).train()
    step = Step(model, TrainingConfig(**case.get("training", {})))
    for number in range(WARM_UP + 3):
        x = images(case, model.config)
        step(x, seed=number, coefficient=1.0, weight=0.01, learning_rate=1e-3)
        other_work()
    assert step.mode == "one CUDA graph", step.mode


def sampler(case: dict[str, Any]) -> None:
    model = model_of(case).eval()
    sampler = Sampler(model, temperature=0.7, **case.get("options", {}))
    for number in range(WARM_UP + 3):
        sampler(case.get("batch", 3), seed=number, first=case.get("first"))
        other_work()


def user(case: dict[str, Any]) -> None:
    """A program that captures by itself, as PyTorch's documentation shows: warm up on a side stream, capture on another."""
    training = case["what"] == "train"
    model = model_of(case).train(training)
    seed, x = torch.zeros((), dtype=torch.int64, device="cuda"), images(case, model.config)

    def body() -> torch.Tensor:
        if training:
            out = model(x, seed=seed)
            loss = (model.reconstruction_loss(out.logits, x) + out.kl.sum(1)).mean()
            loss.backward()
            return loss
        with torch.no_grad():
            return {
                "sample": lambda: model.sample(x.shape[0], 0.7, seed=seed),
                "forward": lambda: model(x, seed=seed).logits,
                "encode": lambda: model.encode(x, seed=seed)[-1],
                "decode": lambda: model.decode(model.encode(x, sample=False)[:1], 0.7, seed=seed),
            }[case["what"]]()

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(WARM_UP):
            body()
            model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    for _ in range(3):
        other_work()
        graph.replay()


def forget() -> None:
    """As in a process of its own: no kernel is loaded and no table is kept."""
    stand_in.Graph.made.clear()
    for _, kernel in jit_functions():
        kernel.device_caches.clear()
    for kept in (weight_norm._addresses, weight_norm._plans, weight_norm._loaded):
        kept.clear()
    device.events.clear()
    driver.reset()


def measure(case: dict[str, Any]) -> dict[str, Any]:
    forget()
    started, failure = time.time(), None
    try:
        {"step": step, "sampler": sampler, "user": user}[case["kind"]](case)
    except Exception as error:
        failure = f"{type(error).__name__}: {error} | {driver.library.standin_refusal().decode()}"
        traceback.print_exc()
    graphs = stand_in.Graph.made
    counts = driver.report()
    return {
        "name": case["name"], "failure": failure, "seconds": round(time.time() - started, 1), "graphs": len(graphs),
        "replays": sum(graph.replays for graph in graphs), "events": [e for g in graphs for e in g.capture.events],
        "pools": [event for event in device.events if "pool of a graph" in event],
        "filled": sum("ops/_capture.py" in event for event in device.events),
        "operators": sum(graph.capture.operators for graph in graphs),
        **{k: v for k, v in counts.items() if k != "kernels"},
        "in_capture": dict(sum((Counter({k["name"]: k["launches_in_capture"]}) for k in counts["kernels"]), Counter())),
    }  # fmt: skip


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print("RESULT " + json.dumps(measure(case)), flush=True)
