"""Every Triton kernel of every operator through Triton's real binder, compiler and launcher, on the stand-in GPU."""

from __future__ import annotations

import os

import pytest
from running import needs_stand_in, results

PARTS = ("mnist", "cifar10", "celeba_64", "imagenet_32", "celeba_256", "ffhq", "odd")
pytestmark = needs_stand_in


@pytest.mark.parametrize("part", PARTS)
def test_operators(part: str) -> None:
    """All combinations with NVAE_FAST_STANDIN_ALL=1, else a covering part of them."""
    everything = ["all"] if os.environ.get("NVAE_FAST_STANDIN_ALL") else []
    (result,) = results("operators.py", part, *everything)
    print(f"{part}: {result['calls']} calls, {result['compiles']} compiles in {result['compile_seconds']} s")
    assert not result["failures"], "\n".join(result["failures"][:20])
    assert result["refused"] == 0
    spilling = [kernel for kernel, spills in result["spills"].items() if spills]
    assert not spilling, f"as compiled for the launch these kernels spill: {spilling}"
    # Weight norm's tables come from the host once; nothing else may.
    assert all("kernels/weight_norm.py" in wait for wait in result["waits"]), result["waits"]
    if part == "odd":
        missing = [kernel for kernel, launches in result["kernels"].items() if not launches]
        assert not missing, f"kernels that no operator launched: {missing}"
        assert result["launchers"] == [], f"launchers that no operator called: {result['launchers']}"
