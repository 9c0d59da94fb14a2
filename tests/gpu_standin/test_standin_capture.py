"""Training steps and samplers of every kind of configuration, captured on the stand-in GPU.

While a stream captures, a driver loads no module; the host waits for nothing and copies nothing; memory that a graph reads
lives as long as the graph. All of it is the same on a GPU, where it would be the first captured step that fails.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
from running import needs_stand_in, results

pytestmark = needs_stand_in

RGB = {"dataset": "cifar10"}
MODELS: dict[str, dict[str, Any]] = {
    "bernoulli": {},
    "mixture of logistics": RGB,
    "flows": {**RGB, "num_nf": 1},
    "two flows, two scales": {"num_nf": 2, "num_latent_scales": 2},
    "normal likelihood": {
        "dataset": "custom", "image_size": 32, "image_channels": 1, "likelihood": "normal",
    },
    "vanilla": {"num_latent_scales": 1, "num_groups_per_scale": 1},
    "elu": {"arch_instance": "res_elu"},
    "elu and flows": {**RGB, "arch_instance": "res_elu", "num_nf": 1},
    "no squeeze-excite, absolute posterior": {"use_se": False, "res_dist": False},
}  # fmt: skip
TRAINING: dict[str, dict[str, Any]] = {
    "accumulate": {"accumulate": 2},
    "checkpointed cells": {"checkpoint_cells": True},
    "bf16": {"autocast": "bf16"},
    "bf16, checkpointed, accumulated, clipped, averaged": {
        "autocast": "bf16", "checkpoint_cells": True, "accumulate": 3, "grad_clip": 10.0, "ema": 0.999,
    },
}  # fmt: skip

STEPS = [{"name": f"step: {name}", "kind": "step", "model": model} for name, model in MODELS.items()]
STEPS += [
    {"name": f"step: {name}, {kind}", "kind": "step", "model": MODELS[name], "training": training}
    for name in ("bernoulli", "flows")
    for kind, training in TRAINING.items()
]
SAMPLERS = [
    {"name": f"sampler: {name}, {pixels}", "kind": "sampler", "model": model, "options": {"pixels": pixels}}
    for name, model in MODELS.items()
    for pixels in (("logits", "sample", "mean") if name in ("bernoulli", "flows") else ("sample",))
]
SAMPLERS += [
    {"name": "sampler: bf16", "kind": "sampler", "model": RGB, "options": {"autocast": "bf16"}},
    {"name": "sampler: one stream an image", "kind": "sampler", "model": RGB, "first": 5},
]
USERS = [
    {"name": f"captured by a user: {what}", "kind": "user", "what": what, "model": MODELS["flows"]}
    for what in ("train", "sample", "forward", "encode", "decode")
]
CASES = [*STEPS, *SAMPLERS, *USERS]


@lru_cache(maxsize=2)
def found(fused: bool) -> dict[str, dict[str, Any]]:
    """All cases in one process, in which the kernels of the others are loaded already: so each begins with one's own."""
    return {result["name"]: result for result in results("steps.py", json.dumps(CASES), fused=fused)}


@pytest.mark.parametrize(
    "fused",
    [
        pytest.param(False, id="without CUDA sources", marks=pytest.mark.xdist_group("without")),
        pytest.param(True, id="with CUDA sources", marks=pytest.mark.xdist_group("with")),
    ],
)
@pytest.mark.parametrize("name", [case["name"] for case in CASES])
def test_capture(name: str, fused: bool) -> None:
    result = found(fused)[name]
    assert result["failure"] is None, result["stderr"][-6000:]
    assert (result["graphs"], result["replays"]) == (1, 3)
    assert result["events"] == [], "the host waited or copied during the capture"
    assert result["pools"] == []
    assert result["loads_in_capture"] == result["compiles_in_capture"] == result["refused"] == 0
    written = result["in_capture"].get("weight_norm.write_kernel", 0)
    if name.startswith("sampler"):  # the frozen copy has its normalised weights
        assert not [kernel for kernel in result["in_capture"] if kernel.startswith("weight_norm.")]
        assert result["filled"] == 0
    elif name.startswith("step"):
        assert written == 0, "the tables of a graph are filled once, not by every replay"
        assert result["filled"] == 1, "one copy fills all tables"
    else:
        assert written <= 4, "a launch brings the addresses of a hundred layers"
    if name.startswith("step"):  # both passes are in the graph
        assert result["in_capture"]["weight_norm.backward_kernel"] >= 1
