"""Start a process with the stand-in GPU: ``from start import nf, device, driver`` before anything imports torch or triton.

NVAE_FAST_STANDIN names the folder of what is built and cached. NVAE_FAST_STANDIN_FUSED=1 pretends that the CUDA sources of
the extension are there: the operators they bring run their formula, in one piece, as a kernel would.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from driver import Driver, build, load

FOLDER = Path(os.environ["NVAE_FAST_STANDIN"])
ROOT = Path(__file__).resolve().parents[2]
os.environ["NVAE_FAST_DISABLE_EXTENSION"] = "1"
library = load(build(FOLDER))

import device as stand_in  # noqa: E402  the library must be there before torch is
import torch  # noqa: E402

driver = Driver(library, lambda: stand_in._streams[-1].cuda_stream)
kernels: dict[str, Any] = {}
_impl = torch.library.Library.impl


def _noting(self: Any, name: Any, function: Any, key: str = "", **more: Any) -> None:
    if key == "CUDA" and self.ns == "nvae_fast":
        kernels[name] = function
    _impl(self, name, function, key, **more)


torch.library.Library.impl = _noting  # type: ignore[method-assign]
sys.path.insert(0, str(ROOT))
from nvae_fast.ops import _backend  # noqa: E402

if os.environ.get("NVAE_FAST_STANDIN_FUSED"):
    for operator in ("depthwise_conv2d", "inverted_residual_cell"):
        _backend.record(operator, "cuda", "cuda")

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
device = stand_in.install(driver, kernels)
driver.owns(lambda address: device.allocation(address) is not None)
