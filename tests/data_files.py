"""Small files of every format, made for the tests of the data part."""

from __future__ import annotations

import gzip
import io
import struct

import numpy as np
import pytest
import torch

from nvae_fast.data.dataset import ImageDataset, MemoryImages


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def memory_dataset(count: int = 50, channels: int = 3, size: int = 8, **options) -> ImageDataset:
    return ImageDataset(
        MemoryImages("memory", random_pixels(count, channels, size, size)), split="train", **options
    )


def as_bytes(dataset: ImageDataset) -> np.ndarray:
    """The dataset's 8-bit pixels back as uint8 (N,C,H,W)."""
    return (dataset.batch(torch.arange(len(dataset)), 0) * 255).round().to(torch.uint8).numpy()


def write_idx(path, images: np.ndarray, *, magic: bytes = b"\0\0\x08\x03") -> None:
    data = magic + struct.pack(f">{images.ndim}I", *images.shape) + images.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_cifar(path, images: np.ndarray) -> None:
    labels = np.arange(len(images), dtype=np.uint8)[:, None] % 10
    path.write_bytes(np.concatenate([labels, images.reshape(len(images), -1)], axis=1).tobytes())


def png_bytes(pixels: np.ndarray) -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(path, count: int = 6, size: int = 8) -> np.ndarray:
    """`count` RGB PNG files in two subfolders; their pixels (N,H,W,3) in sorted order."""
    pixels = random_pixels(count, size, size, 3)
    for i, picture in enumerate(pixels):
        folder = path / ("a" if i < count // 2 else "b")
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"{i:03}.png").write_bytes(png_bytes(picture))
    return pixels


def write_lmdb(path, values: list[bytes], first: int = 0) -> None:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for i, value in enumerate(values):
            transaction.put(str(first + i).encode("ascii"), value)
