"""Omniglot as generative models use it: chardata.mat, a MATLAB file of 28x28 characters with values in [0, 1].

It holds `data` (784, 24345) and `testdata` (784, 8070), an image in each column, stored column by column.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import contents
from .arrays import check_expansion
from .dataset import MemoryImages
from .extras import require
from .fit import array_source
from .retry import named

FILE_NAME = "chardata.mat"
_KEYS = {"train": "data", "test": "testdata"}


def open_omniglot(
    path: Path, split: str, image_size: int | None, channels: int | None
) -> tuple[MemoryImages, bool]:
    """The images of a .mat file, or of chardata.mat in a folder, and True. Values are rounded to 8 bits."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no {FILE_NAME}")
    size = contents.check_regular(file)
    matlab = require("scipy.io", "scipy", "reading Omniglot's .mat file")
    key = _KEYS[split]
    with open(file, "rb") as opened:
        head = contents.but_it_is(opened.read(contents.HEAD))
    with named(file, f"cannot be read as a MATLAB file{head}"):
        shapes = {name: (shape, kind) for name, shape, kind in matlab.whosmat(str(file))}
        if key not in shapes:
            raise ValueError(f"no array {key!r} of {split} images, found {list(shapes)}")
        shape, kind = shapes[key]
        if len(shape) != 2 or shape[0] != 784 or kind not in ("double", "single", "uint8", "logical"):
            raise ValueError(
                f"array {key!r}: expected numbers of shape (784, N), got {kind} of shape {shape}"
            )
        check_expansion(shape[0] * shape[1] * (8 if kind == "double" else 4), size, str(file))
        values = np.asarray(matlab.loadmat(str(file), variable_names=[key])[key], dtype=np.float32)
    if not (values.min(initial=0) >= 0 and values.max(initial=0) <= 1):
        raise ValueError(
            f"{file}: array {key!r} has values from {values.min():g} to {values.max():g}, expected 0 to 1"
        )
    pixels = np.floor(values.T * 255 + np.float32(0.5)).astype(np.uint8)
    upright = pixels.reshape(-1, 28, 28).transpose(0, 2, 1)
    source = array_source(np.ascontiguousarray(upright)[:, None], str(file), image_size, channels)
    source.binary_format = True
    return source, True
