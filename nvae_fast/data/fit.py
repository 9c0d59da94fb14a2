"""Fitting arrays of ready-made images to what was asked: layout, channels, size."""

from __future__ import annotations

import numpy as np


def to_nchw(pixels: np.ndarray, where: str, channels: int | None) -> np.ndarray:
    """uint8 (N,H,W), (N,H,W,C) or (N,C,H,W), C in {1, 3} -> (N,C,H,W), a view where possible.

    Which of the two four-dimensional layouts it is follows from where a 1 or 3 stands. When it stands in
    both places (say (N,3,3,3), or (N,1,28,1)), `channels` decides, then square images are preferred, then
    channels last.
    """
    if pixels.dtype != np.uint8:
        raise ValueError(
            f"{where}: expected uint8 pixels (0 to 255), got {pixels.dtype} of shape {pixels.shape}"
        )
    shapes = "(N,H,W), (N,H,W,C) or (N,C,H,W) with C = 1 or 3"
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim != 4:
        raise ValueError(f"{where}: expected {shapes}, got {pixels.shape}")
    last, first = pixels.shape[3] in (1, 3), pixels.shape[1] in (1, 3)
    if last and first:
        rank_last = (pixels.shape[3] == channels, pixels.shape[1] == pixels.shape[2])
        rank_first = (pixels.shape[1] == channels, pixels.shape[2] == pixels.shape[3])
        first = rank_first > rank_last
    elif not last and not first:
        raise ValueError(f"{where}: expected {shapes}, got {pixels.shape}")
    return pixels if first else pixels.transpose(0, 3, 1, 2)


def fit_pixels(pixels: np.ndarray, where: str, image_size: int | None, channels: int | None) -> np.ndarray:
    """(N,C,H,W) uint8, contiguous, checked against what was asked for; one-channel 28x28 becomes 32x32.

    28x28 one-channel images (MNIST, Omniglot) get two pixels of zeros on each side unless `image_size` is
    28. Nothing else is resized here: arrays are taken to be prepared, and a size that does not match is an
    error.
    """
    _, c, height, width = pixels.shape
    if height != width:
        raise ValueError(f"{where}: expected square images, got {height}x{width}")
    if channels is not None and c != channels:
        raise ValueError(f"{where}: expected {channels} channel(s), the images have {c}")
    if c == 1 and height == 28 and image_size in (None, 32):
        return np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)))
    if image_size is not None and height != image_size:
        raise ValueError(f"{where}: expected images of {image_size}x{image_size}, got {height}x{width}")
    return np.ascontiguousarray(pixels)
