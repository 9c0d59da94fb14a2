"""Encoded images (PNG, JPEG, ...) into uint8 arrays of one size, with Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .extras import require

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".avif", ".avifs", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".qoi",
)  # fmt: skip
"""Endings of file names that are taken for images."""

# The formats Pillow may try. Others are left out: PostScript, for one, would start a program.
_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "WEBP", "AVIF", "GIF", "TIFF", "PPM", "JPEG2000", "QOI")
_MAGIC = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51", b"qoif",
)  # fmt: skip
# A small file may ask for any number of pixels. Within these bounds decoding takes less than 500 MB, also where the decoder
# of a format keeps further copies.
MAX_PIXELS = 30_000_000
_FEWER_PIXELS = {"WEBP": 20_000_000, "JPEG2000": 15_000_000}
MAX_FILE_BYTES = 1 << 28
_ROWS_AT_ONCE = 256


class DamagedImage(ValueError):
    """One image cannot be decoded; the others may be fine."""


class DatasetError(ValueError):
    """What is wrong concerns all images of the set: it is an error whatever share of images may be skipped."""


def looks_encoded(head: bytes) -> bool:
    """Whether the first bytes (16 suffice) are those of an image file that Pillow reads."""
    return (
        head.startswith(_MAGIC)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"mif1"))
    )


def open_image(data: bytes) -> Any:
    """A Pillow image of the bytes of a file, its header read. DamagedImage when they are none, or ask for too much."""
    image = require("PIL.Image", "Pillow", "reading image files")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", image.DecompressionBombWarning)  # our own bound is lower
            picture = image.open(io.BytesIO(data), formats=_known_formats(image))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds
        raise DamagedImage(f"{type(error).__name__}: {error}") from error
    most = _FEWER_PIXELS.get(picture.format or "", MAX_PIXELS)
    if picture.width * picture.height > most:
        raise DamagedImage(f"{picture.width}x{picture.height} pixels, more than the {most} that are decoded")
    return picture


def _known_formats(image: Any) -> list[str]:
    image.init()
    return [name for name in _FORMATS if name in image.OPEN]


@dataclass(frozen=True)
class PixelRange:
    """What the stored values of a set of images mean; decided once for all of them by :func:`find_range`.

    eight: factor on 8-bit values, 255 where they are 0 and 1 only. sixteen: the value that is white in 16- and
    32-bit integer images. real: the value that is white in float images.
    """

    eight: int = 1
    sixteen: int = 65535
    real: float = 1.0

    def check_eight(self, largest: int) -> None:
        """Raise DatasetError when 8-bit values up to `largest` contradict `eight`."""
        if self.eight != 1 and largest > 1:
            raise DatasetError(
                f"values up to {largest}, where the images looked at first are 0 and 1 only: save all images with "
                "the same range, 0 to 255"
            )


RESAMPLE = ("lanczos", "bilinear")
"""The filters that images may be resized with."""
_CELEBA_ALIGNED = (178, 218)


@dataclass(frozen=True)
class Reading:
    """How an image becomes a square of the size that is asked for.

    crop: pixels a side of the centre crop; None: the short side. resample: one of `RESAMPLE`. only: (width, height) of
    the images that `crop` is meant for, others are cropped to their short side; None: all of them.
    """

    crop: int | None = None
    resample: str = "lanczos"
    only: tuple[int, int] | None = None

    def side(self, size: tuple[int, int]) -> int:
        """Pixels a side of the centre crop of an image of (width, height). DatasetError when that is smaller."""
        short = min(size)
        if self.crop is None or (self.only is not None and size != tuple(self.only)):
            return short
        if self.crop > short:
            raise DatasetError(
                f"crop (--crop): {self.crop} is more than the short side of an image of {size[0]}x{size[1]} pixels"
            )
        return self.crop


# CelebA 64 was published with this crop of the aligned faces.
PUBLISHED = {"celeba_64": Reading(148, "bilinear", _CELEBA_ALIGNED)}
"""How the images of a published data set are read, where it is not as others are."""
EVALUATED_ON = {"celeba_64": "validation"}
"""The part that published results of a data set belong to, where it is not the test part."""


def _family(picture: Any) -> str:
    """ "eight" for gray or RGB of 8 bits, "sixteen" for wider integers, "real" for floats, else ""."""
    if picture.mode.startswith("I"):
        return "sixteen"
    return {"L": "eight", "LA": "eight", "RGB": "eight", "RGBA": "eight", "F": "real"}.get(picture.mode, "")


def _largest(picture: Any) -> float:
    bands = 1 if picture.mode in ("L", "LA") else 3
    extrema = picture.getextrema()
    if isinstance(extrema[0], tuple):
        return max(high for _, high in extrema[:bands])
    return extrema[1]


def find_range(pictures: Iterable[Any], where: str) -> PixelRange:
    """Decide what values mean from some images of a set, read until the first leaves no doubt. Warns when unusual."""
    largest: dict[str, float] = {}
    certain = {"eight": 1, "sixteen": 255, "real": 1}
    for picture in pictures:
        family = _family(picture)
        if not family:
            continue
        largest[family] = max(largest.get(family, 0), _largest(picture))
        if all(value > certain[name] for name, value in largest.items()):
            break
    eight, sixteen, real = 1, 65535, 1.0
    if largest.get("eight") == 1:
        eight = 255
        _warn(where, "8-bit images of 0 and 1 only", "1 is white")
    if 0 < largest.get("sixteen", 0) <= 255:
        sixteen = 1 if largest["sixteen"] == 1 else 255
        _warn(where, f"16-bit images with values up to {largest['sixteen']:g}", f"{sixteen} is white")
    if "real" in largest:
        real = 1.0 if largest["real"] <= 1 else 255.0
        _warn(where, f"float images with values up to {largest['real']:g}", f"{real:g} is white")
    return PixelRange(eight, sixteen, real)


def _warn(where: str, what: str, decision: str) -> None:
    warnings.warn(f"{where}: {what}: {decision}", stacklevel=3)


def _scaled(picture: Any, white: float) -> np.ndarray:
    """uint8 (H,W): values 0..`white` of an integer or float image as 0..255, rounded to nearest."""
    values = np.asarray(picture)
    out = np.empty(values.shape, dtype=np.uint8)
    for start in range(0, len(values), _ROWS_AT_ONCE):
        rows = values[start : start + _ROWS_AT_ONCE]
        if not (rows.min() >= 0 and rows.max() <= white):  # also when there is a NaN
            raise DatasetError(
                f"values from {rows.min():g} to {rows.max():g}, expected 0 to {white:g} "
                f"({'a float' if picture.mode == 'F' else 'an integer'} image): convert the images to 8 bits"
            )
        if picture.mode == "F":
            out[start : start + len(rows)] = np.floor(rows.astype(np.float64) * (255 / white) + 0.5)
        else:
            out[start : start + len(rows)] = (rows.astype(np.int64) * 255 + int(white) // 2) // int(white)
    return out


def fit_image(
    picture: Any, size: int, channels: int, values: PixelRange | None = None, reading: Reading | None = None
) -> np.ndarray:
    """uint8 (C,size,size), RGB or gray: upright by its EXIF tag, centre-cropped and resized as `reading` says.

    A picture that already has this size keeps its pixels unchanged. Raises DatasetError when its values
    contradict `values`.
    """
    values, reading = values or PixelRange(), reading or Reading()
    image = require("PIL.Image", "Pillow", "reading image files")
    require("PIL.ImageOps", "Pillow", "reading image files").exif_transpose(picture, in_place=True)
    family = _family(picture)
    if family == "eight" and values.eight != 1:
        values.check_eight(int(_largest(picture)))
        picture = picture.point(lambda value: value * 255)
    elif family in ("sixteen", "real"):  # which convert() would clip instead of scale
        picture = image.fromarray(_scaled(picture, values.sixteen if family == "sixteen" else values.real))
    side = reading.side(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    mode = "RGB" if channels == 3 else "L"
    if picture.mode != mode:
        picture = picture.convert(mode)
    if (left, top, picture.width, picture.height) != (0, 0, side, side):
        picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), image.Resampling[reading.resample.upper()])
    pixels = np.asarray(picture, dtype=np.uint8).reshape(size, size, channels)
    return pixels.transpose(2, 0, 1)
