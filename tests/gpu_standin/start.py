"""Start a process with the stand-in GPU: ``from start import nf, device, driver`` before anything imports torch or triton.

NVAE_FAST_STANDIN names the folder of what is built and cached. NVAE_FAST_STANDIN_FUSED=1 pretends that the CUDA sources of
the extension are there: the operators they bring run their formula, in one piece, as a kernel would.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from driver import Driver, build, load

FOLDER = Path(os.environ["NVAE_FAST_STANDIN"])
ROOT = Path(__file__).resolve().parents[2]
os.environ["NVAE_FAST_DISABLE_EXTENSION"] = "1"
library = load(build(FOLDER))

import device as stand_in  # noqa: E402  the library must be there before torch is
import torch  # noqa: E402
import triton  # noqa: E402, F401  for scripts that must not import it before this

driver = Driver(library, lambda: stand_in._image_seeds[-1].cuda_stream)
kernels: dict[str, Any] = {}
_impl = torch.library.Library.impl


called: set[str] = set()


def _noting(self: Any, name: Any, function: Any, key: str = "", **more: Any) -> None:
    if key == "CUDA" and self.ns == "nvae_fast":
        kernels[name] = functools.partial(_called, name, function)
    _impl(self, name, function, key, **more)


def _called(name: str, function: Any, *args: Any, **more: Any) -> Any:
    called.add(name)
    return function(*args, **more)


torch.library.Library.impl = _noting  # type: ignore[method-assign]
sys.path.insert(0, str(ROOT))
import nvae_fast as nf  # noqa: E402, F401
from nvae_fast.ops import _backend  # noqa: E402

if os.environ.get("NVAE_FAST_STANDIN_FUSED"):
    for operator in ("depthwise_conv2d", "inverted_residual_cell"):
        _backend.record(operator, "cuda", "cuda")

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
device = stand_in.install(driver, kernels)
driver.owns(device.use)


def jit_functions() -> Iterator[tuple[str, Any]]:
    """The functions of nvae_fast/kernels that Triton compiles, each with its name ("module.function")."""
    from triton.runtime.jit import JITFunction

    for path in sorted((ROOT / "kernels").glob("*.py")):
        module = importlib.import_module(f"nvae_fast.kernels.{path.stem}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                yield f"{path.stem}.{name}", value
