"""This package's kernels in models that were built elsewhere: ``accelerate``, ``acceleration_report``, ``restore``."""

from nvae_fast.patching import (
    freezing as freezing,
)  # registers what nvae_fast.freeze makes of accelerated parts
from nvae_fast.patching.apply import AccelerationReport, accelerate, acceleration_report, restore

__all__ = ["AccelerationReport", "accelerate", "acceleration_report", "restore"]
