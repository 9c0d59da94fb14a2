"""Triton on the stand-in driver: the real JIT, compiler and launcher, with a libcuda that runs nothing (driver.c).

Import before triton is: the folder of the library is an environment variable that triton reads.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def build(folder: Path) -> Path:
    """The library, compiled by gcc where the one in ``folder`` is not of this source."""
    folder.mkdir(parents=True, exist_ok=True)
    library, source = folder / "libcuda.so.1", HERE / "driver.c"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        part = folder / f"libcuda.{os.getpid()}"
        subprocess.run(
            ["gcc", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(part)],
            check=True,
        )
        part.replace(library)
    return folder


def load(folder: Path) -> ctypes.CDLL:
    """The library, for the whole process. Before torch is imported, of which it replaces a function."""
    assert not {"torch", "triton"} & sys.modules.keys()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "cache"))
    return ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)


class Driver:
    """Triton's driver on the library, and what that counted."""

    def __init__(self, library: ctypes.CDLL, stream: Callable[[], int]) -> None:
        self.library = library
        self.library.standin_report.restype = ctypes.c_long
        self.library.standin_report.argtypes = [ctypes.c_char_p, ctypes.c_long]
        self.library.standin_refusal.restype = ctypes.c_char_p
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime.driver import driver

        class StandIn(CudaDriver):
            def __init__(self) -> None:
                super().__init__()
                self.get_current_device = lambda: 0
                self.get_current_stream = lambda device=0: stream()
                self.set_current_device = lambda device: None
                self.get_device_capability = lambda device=0: (9, 0)
                make, load_binary, names = self.launcher_cls, self.utils.load_binary, []

                def launcher(source: Any, metadata: Any) -> Any:  # made just before its binary is loaded
                    names.append(f"{source.fn.__module__.rpartition('.')[2]}.{source.fn.__name__}")
                    launch, name = make(source, metadata), names[-1]

                    def checked(*args: Any) -> None:
                        for value in args:
                            if hasattr(value, "data_ptr") and value.data_ptr() % value.element_size():
                                raise RuntimeError(f"{name}: misaligned address of {value.dtype}")
                        launch(*args)

                    return checked

                def labelled(*args: Any) -> Any:
                    loaded = load_binary(*args)
                    library.standin_label(names[-1].encode())
                    return loaded

                self.launcher_cls, self.utils.load_binary = launcher, labelled

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", 90, 32)

        self.triton = StandIn()
        driver.set_active(self.triton)
        self.capturing = False
        self.compiles = self.compiles_in_capture = 0
        self.seconds = 0.0  # of the compiler
        triton.knobs.compilation.listener = self._compiled

    def _compiled(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        self.compiles += not cache_hit
        self.compiles_in_capture += self.capturing
        self.seconds += 0 if cache_hit else times.total / 1e6

    def capture(self, on: bool) -> None:
        self.capturing = on
        self.library.standin_capture(int(on))

    def owns(self, check: Callable[[int], bool]) -> None:
        """``check(address)``: whether it is device memory; launches with other pointers are refused."""
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)
        self._check = kind(lambda address: 0 if check(address) else 1)  # kept: the library calls it
        self.library.standin_owns(self._check)

    def device(self, *, shared: int) -> None:
        """Pretend that a block may have ``shared`` bytes of shared memory."""
        self.library.standin_device(90, shared, shared + 1024, 132)

    def reset(self) -> None:
        self.library.standin_reset()
        self.compiles = self.compiles_in_capture = 0
        self.seconds = 0.0

    def report(self) -> dict[str, Any]:
        text = ctypes.create_string_buffer(self.library.standin_report(None, 0))
        self.library.standin_report(text, len(text))
        counts = json.loads(text.value)
        counts |= {"compiles": self.compiles, "compiles_in_capture": self.compiles_in_capture}
        return counts | {"compile_seconds": round(self.seconds, 1)}
