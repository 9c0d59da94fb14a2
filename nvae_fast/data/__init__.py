"""Images for NVAE: built-in sets, images from a path, deterministic batches, and PNG grids.

    ds = nvae_fast.data.open_dataset("digits", split="train")
    for x in nvae_fast.data.BatchLoader(ds, 32, seed=0).epoch(0):     # x (32,1,32,32) float32 in [0,1]
        ...
    nvae_fast.data.save_grid(x, "digits.png")

Nothing here needs a network. Pillow, scikit-learn and lmdb are imported when a source needs them (the
extra `data` installs them: `pip install ".[data]"` in this package's sources).
"""

from .dataset import ImageDataset
from .loader import BatchLoader
from .png import save_grid
from .preparation import prepare
from .sources import KINDS, open_dataset
from .speed import LoaderSpeed, default_workers, loader_speed

__all__ = [
    "KINDS",
    "BatchLoader",
    "ImageDataset",
    "LoaderSpeed",
    "default_workers",
    "loader_speed",
    "open_dataset",
    "prepare",
    "save_grid",
]
